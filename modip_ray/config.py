"""Typed settings: load, stack, override, validate, dump. Strict: an unknown key or a wrong type names the nearest key and the type.

The values live in configs/default.yaml, with a comment above every field; the classes below say what types they have. A run's settings are
default.yaml <- configs/tasks/<task>.yaml <- --config files <- dotted overrides, later ones winning. YAML is data only.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import hashlib
import json
import math
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from modip_ray.config_rules import ConfigError as ConfigError
from modip_ray.config_rules import shown, validate
from modip_ray.oneline import first_line

FREE_FORM = ("env_kwargs", "placement", "num_workers")      # taken over whole: their keys are the user's, or they may be a number as well


@dataclass(frozen=True)
class Task:
    name: str
    env: str
    env_kwargs: dict
    family: str | None
    metric: Literal["return", "subtasks", "success"]
    max_episode_steps: int


@dataclass(frozen=True)
class Data:
    source: str
    filter_key: str | None
    rewards: Literal["stored", "newly_done", "until_success"]
    transitions: int
    max_transitions: int | None
    cache: str | None


@dataclass(frozen=True)
class Policy:
    kind: Literal["diffusion", "gaussian", "tdmpc2", "dsrl"]
    network: Literal["mlp", "unet"]
    horizon: int
    n_action_steps: int
    width: int
    blocks: int
    denoising_steps: int
    sampling_steps: int
    parametrization: Literal["eps", "sample"]
    batch_size: int
    lr: float
    lr_final: float
    ema: float
    updates_per_update: int
    entropy: float


@dataclass(frozen=True)
class WorldModel:
    latent: int
    width: int
    simnorm_group: int
    batch_size: int
    horizon: int
    lr: float
    lr_final: float
    encoder_lr_scale: float
    rho: float
    consistency: float
    reward: float
    termination: float
    obs_scale: Literal["std", "range"]
    obs_std_floor: float
    grad_clip: float


@dataclass(frozen=True)
class Critic:
    width: int
    members: int
    head: Literal["regression", "two_hot"]
    unit: Literal["std", "max"]
    bins: int
    bound: float
    gamma: float
    tau: float
    expectile: float
    n_step: int
    pretrain_n_step: int
    td_lambda: float
    updates_per_update: int
    weight: float
    target: Literal["value", "policy_q", "planned_q"]
    target_reduce: Literal["mean", "min_two"]


@dataclass(frozen=True)
class Planner:
    kind: Literal["mppi", "action_values"]
    horizon: int
    n_action_steps: int
    proposals: int
    gaussian: int
    elites: int
    iterations: int
    temperature: float
    proposal_steps: int
    std_min: float
    explore: bool
    max_rows: int
    max_wait_ms: float
    weights_every_s: float
    replicas: int
    tail: Literal["value", "policy_q"]
    first_round: Literal["elites", "wide"]
    step_size: float


@dataclass(frozen=True)
class Guard:
    std_max: float
    std_max_final: float
    trust: float
    trust_final: float
    widen_steps: int
    value_penalty: float
    value_reduce: Literal["mean", "min"]
    min_gain: float


@dataclass(frozen=True)
class Distill:
    rule: Literal["all", "predicted", "realised", "positive", "exponential"]
    target: Literal["executed", "planned"]
    n_step: int
    min_gain: float
    beta: float
    reanalyze: float
    q_weight: float
    online_share_start: float
    online_share_end: float


@dataclass(frozen=True)
class Learner:
    explodes: float
    max_bad_updates: int
    snapshot_every: int
    max_roll_backs: int


@dataclass(frozen=True)
class Pretrain:
    updates: int
    policy_updates: int
    start: str | None


@dataclass(frozen=True)
class Online:
    env_steps: int
    updates_per_step: float
    online_share_start: float
    online_share_end: float
    min_online: int
    lr_scale: float
    policy_lr_scale: float | None
    lr_final_scale: float


@dataclass(frozen=True)
class DPPO:
    denoising_steps: int
    num_envs: int
    n_steps: int
    epochs: int
    minibatches: int
    critic_warmup: int
    actor_lr: float
    critic_lr: float
    critic_width: int
    gamma: float
    gae_lambda: float
    denoising_gamma: float
    clip: float
    clip_base: float
    clip_rate: float
    min_std: float
    target_kl: float


@dataclass(frozen=True)
class WorkerRange:
    min: int
    max: int


@dataclass(frozen=True)
class Rollout:
    num_workers: int | WorkerRange
    envs_per_worker: int
    groups: int
    segment_length: int
    env_timeout_s: float
    max_env_failures: float

    @property
    def least(self) -> int:
        """Workers without which a run does not start."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers.min

    @property
    def most(self) -> int:
        """Workers that it takes where the cluster has room for them."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers.max


@dataclass(frozen=True)
class Replay:
    shards: int
    capacity: int
    samples_per_insert_slack: float
    prefetch: int


@dataclass(frozen=True)
class Eval:
    episodes: int
    every_steps: int
    every_episodes: int
    seed: int
    bootstrap: int


@dataclass(frozen=True)
class Resources:
    device: str
    precision: Literal["fp32", "bf16", "auto"]
    learner_precision: Literal["fp32", "bf16"]
    compile: Literal[True, False, "auto"]
    planner_gpus: float
    learner_gpus: float
    learner_replicas: int
    planner_cpus: float
    learner_cpus: float
    rollout_cpus: float
    placement: dict
    ray_address: str
    wait_for_nodes_s: float
    torch_threads: int
    call_timeout_s: float
    silent_s: float
    restart_s: float
    snapshot_s: float

    @property
    def patience_s(self) -> float:
        """How long one role waits for another, which may be starting again. The driver, who knows whether it is, ends a run before that."""
        return self.call_timeout_s + self.restart_s


@dataclass(frozen=True)
class Log:
    every_s: float
    checkpoint_every_s: float
    keep_checkpoints: int
    audit: bool
    keep_best: bool
    mirror: str | None
    grace_s: float
    tensorboard: bool
    ray_metrics: bool
    wandb: Literal["disabled", "offline", "online"]
    wandb_project: str
    video: bool


@dataclass(frozen=True)
class Config:
    task: Task
    run_dir: str | None
    seed: int
    serial: bool
    method: Literal["modip", "dppo"]
    data: Data
    policy: Policy
    world_model: WorldModel
    critic: Critic
    planner: Planner
    guard: Guard
    distill: Distill
    learner: Learner
    pretrain: Pretrain
    online: Online
    dppo: DPPO
    rollout: Rollout
    replay: Replay
    eval: Eval
    resources: Resources
    log: Log

    @property
    def one_process(self) -> bool:
        """No Ray: asked for, or a rival method."""
        return self.serial or self.method != "modip"

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def dump(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    def hash(self) -> str:
        """Identity of the settings that decide results (not where they run or are written, nor those of a method that is not used)."""
        rivals = ("method", "dppo") if self.method == "modip" else ()
        kept = {k: v for k, v in self.to_dict().items() if k not in ("run_dir", "resources", "log", "serial", *rivals)}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]

    def replace(self, dotted: dict[str, Any]) -> Config:
        """A copy with dotted keys set, e.g. ``cfg.replace({"planner.horizon": 3})``; checked as strictly as a file."""
        tree = self.to_dict()
        for key, value in dotted.items():
            set_dotted(tree, key, value)
        return build(tree)


def config_dir() -> Path:
    """The folder of shipped configurations: inside an installed package, or beside the package in a checkout."""
    here = Path(__file__).resolve().parent
    for folder in (here / "configs", here.parent / "configs"):
        if (folder / "default.yaml").is_file():
            return folder
    raise ConfigError(f"configs/default.yaml was found neither in {here} nor in {here.parent}; reinstall modip_ray")


def task_names() -> list[str]:
    return sorted(p.stem for p in (config_dir() / "tasks").glob("*.yaml"))


def load(config: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Settings from the defaults, an optional YAML file and dotted overrides such as ``planner.horizon=4`` or ``task=hopper-medium``."""
    tree = defaults()
    layers: list[tuple[str, Any]] = []
    file_tree = read_yaml(find_config(config)) if config is not None else {}
    task = file_tree.pop("task", None) if isinstance(file_tree.get("task"), str) else None
    for item in overrides:
        if item.startswith("task="):
            task = item.removeprefix("task=")
            file_tree.pop("task", None)                     # the command line wins over the file, also where the file spells the group out
        else:
            layers.append(parse_override(item))
    merge(tree, task_tree(task) if task is not None else {}, "task file")
    merge(tree, file_tree, str(config))
    for key, value in layers:
        set_dotted(tree, key, value)
    return build(tree)


def parse_override(item: str) -> tuple[str, Any]:
    """("planner.horizon", 4) out of "planner.horizon=4"."""
    key, sep, text = item.partition("=")
    if not sep or not key:
        raise ConfigError(f"override {shown(item)} is not of the form key=value, e.g. planner.horizon=4")
    return key, parse_scalar(text)


def parse_scalar(text: str) -> Any:
    """A YAML scalar; unlike YAML 1.1, 1e-4 is a number too."""
    try:
        value = yaml.load(text, OnceLoader)
    except yaml.YAMLError as e:
        raise ConfigError(f"cannot read the value {shown(text)}: {yaml_problem(e)}") from e
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def find_config(name: str | Path) -> Path:
    """A path as given, or the name of a file under configs/."""
    for path in (Path(name), config_dir() / name, config_dir() / f"{name}.yaml"):
        if path.is_file():
            return path
    known = sorted(str(p.relative_to(config_dir()).with_suffix("")) for p in [*config_dir().glob("*.yaml"), *config_dir().glob("cluster/*.yaml")])
    raise ConfigError(f"no configuration {shown(str(name))}{nearest(str(name), known)}: not a file, and {config_dir()} holds {', '.join(known)}")


def task_tree(name: str) -> dict[str, Any]:
    """configs/tasks/<name>.yaml, on top of the task that its `extends` names."""
    path = config_dir() / "tasks" / f"{name}.yaml"
    if not path.is_file():
        close = difflib.get_close_matches(name, task_names(), n=4, cutoff=0.5)
        raise ConfigError(f"unknown task {shown(name)}; {'did you mean one of' if close else 'known tasks:'} {', '.join(close or task_names())}")
    tree = read_yaml(path)
    base = tree.pop("extends", None)
    if base is None:
        return tree
    return stacked(task_tree(base), tree)


def stacked(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Both mappings, group by group; where both have a setting, `above` counts."""
    both = {k: stacked(below[k], v) if isinstance(v, dict) and isinstance(below.get(k), dict) and k not in FREE_FORM else v for k, v in above.items()}
    return below | both


class OnceLoader(yaml.SafeLoader):
    """YAML data, in which a key that is given twice is an error, as the first one would be dropped without a word, and a day is text: it names a folder."""

    yaml_implicit_resolvers = {first: [r for r in resolvers if r[0] != "tag:yaml.org,2002:timestamp"]
                               for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()}

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node, seen = super().compose_mapping_node(anchor), set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
                seen.add(key.value)
        return node


def yaml_problem(error: Exception) -> str:
    """One line of what YAML says in several."""
    problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
    return (problem or first_line(error)) + (f" (line {mark.line + 1}, column {mark.column + 1})" if mark is not None else "")


def defaults() -> dict[str, Any]:
    """default.yaml's tree, to be changed at will: the file is parsed once."""
    return copy.deepcopy(parsed(config_dir() / "default.yaml"))


@cache
def parsed(path: Path) -> dict[str, Any]:
    return read_yaml(path)


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(), OnceLoader)
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: cannot be read as YAML data: {yaml_problem(e)}") from e
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping of settings, got {type(tree).__name__}")
    return tree


def nearest(key: str, allowed: Sequence[str]) -> str:
    close = difflib.get_close_matches(key, allowed, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def merge(tree: dict[str, Any], layer: dict[str, Any], source: str, prefix: str = "") -> None:
    """Stack `layer` on `tree` in place; keys that the tree lacks are errors."""
    for key, value in layer.items():
        if key not in tree:
            raise ConfigError(f"{source}: unknown setting {prefix}{shown(key)}{nearest(str(key), list(tree))} (allowed here: {', '.join(tree)})")
        if isinstance(tree[key], dict) and key not in FREE_FORM:
            if not isinstance(value, dict):
                raise ConfigError(f"{source}: {prefix}{key} is a group of settings ({', '.join(tree[key])}), got {shown(value)}")
            merge(tree[key], value, source, f"{prefix}{key}.")
        else:
            tree[key] = value


def set_dotted(tree: dict[str, Any], dotted: str, value: Any) -> None:
    layer: Any = value
    for part in reversed(dotted.split(".")):
        layer = {part: layer}
    merge(tree, layer, "override")


def build(tree: dict[str, Any]) -> Config:
    """Check types and ranges, and freeze."""
    cfg = typed(Config, tree, "")
    validate(cfg)
    return cfg


def typed(kind: Any, value: Any, where: str) -> Any:
    """`value` as `kind`, or ConfigError. An int is accepted for a float; nothing else is converted."""
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ConfigError(f"{where or 'config'}: expected a group of settings, got {shown(value)}")
        hints = typing.get_type_hints(kind)
        names = [f.name for f in dataclasses.fields(kind)]
        unknown, missing = [k for k in value if k not in names], [n for n in names if n not in value]
        if unknown:
            raise ConfigError(f"unknown setting {where}{shown(unknown[0])}{nearest(str(unknown[0]), names)}")
        if missing:
            raise ConfigError(f"missing setting {where}{missing[0]!r}")
        return kind(**{n: typed(hints[n], value[n], f"{where}{n}." if dataclasses.is_dataclass(hints[n]) else f"{where}{n}") for n in names})
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if value in args:
            return value
        raise ConfigError(f"{where}: got {shown(value)}, allowed: {', '.join(map(str, args))}{nearest(str(value), [str(a) for a in args])}")
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        group = next((a for a in args if dataclasses.is_dataclass(a)), None)
        if group is not None and isinstance(value, dict):                          # a number, or a mapping in its place
            return typed(group, value, f"{where}.")
        return typed(next(a for a in args if a not in (type(None), group)), value, where)
    ok = isinstance(value, kind) and not (kind is not bool and isinstance(value, bool))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is float and isinstance(value, str):
        value = parse_scalar(value)                                                 # YAML 1.1 reads 1e-4 as text
        ok = isinstance(value, float)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if not ok or (kind is float and not math.isfinite(value)):
        raise ConfigError(f"{where}: expected {'a finite ' if ok else ''}{kind.__name__}, got {shown(value)} ({type(value).__name__})")
    return value
