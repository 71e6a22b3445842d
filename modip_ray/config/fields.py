"""The typed fields of a configuration. Their values live in configs/default.yaml, with a comment above every field."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal

from modip_ray.config.rules import validate
from modip_ray.config.tree import set_dotted, typed
from modip_ray.config.yaml_data import dump_yaml


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
    samples: int
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
        return dump_yaml(self.to_dict())

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


def build(tree: dict[str, Any]) -> Config:
    """Check types and ranges, and freeze."""
    cfg = typed(Config, tree, "")
    validate(cfg)
    return cfg
