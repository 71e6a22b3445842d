"""What one trial of a search runs: a configuration with several training seeds. Strict like config/; no torch, no Ray."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modip_ray.config import Config, ConfigError, load, nearest
from modip_ray.config.rules import divisible
from modip_ray.learning.env_source import check_family
from modip_ray.runfolder import saved_config
from modip_ray.start import ELSEWHERE, ONLINE_ONLY, belongs, flat, offline_differences

#: Keys of a param_space that are no settings of a run, with what they mean.
SEARCH_KEYS = {
    "task": "name of a task (configs/tasks)", "config": "YAML file below the other settings", "start": "run folder whose pre-training all trials share",
    "seeds": "training seeds of a configuration: how many, or a list", "steps_per_iteration": "environment steps between two reports",
    "cpus": "CPUs of a trial", "gpus": "GPUs of a trial",
}
#: Set by the trial itself.
OWN = {"run_dir": "Tune keeps each trial's folder", "serial": "a trial runs in one process", "seed": "give 'seeds'"}

#: Settings of both phases that can change on a trained state: they alter neither shapes nor what is stored.
LEARNING = ("policy.lr", "policy.ema", "policy.batch_size", "world_model.lr", "world_model.encoder_lr_scale", "world_model.batch_size", "world_model.horizon",
            "world_model.rho", "world_model.consistency", "world_model.reward", "world_model.termination", "world_model.grad_clip", "critic.tau",
            "critic.expectile", "critic.weight")
#: Of those groups, what a trained state cannot change: they count from the start of the online phase.
WHOLE_PHASE = ("online.env_steps", "online.min_online")


@dataclass(frozen=True)
class TrialSettings:
    """A trial: `cfg` with each of `seeds`, evaluated every `steps` environment steps. `start`: the run whose pre-training it goes on from."""

    cfg: Config
    seeds: tuple[int, ...]
    steps: int
    start: Path | None
    cpus: float
    gpus: float

    def member(self, seed: int) -> Config:
        """One seed's settings, as it runs in the trial's process: without a GPU it does not look for one, and of several it sees the one that Ray gave it."""
        device = self.cfg.resources.device
        here = "cpu" if self.gpus == 0 and device == "auto" else "cuda" if device.startswith("cuda") else device
        return self.cfg.replace({"seed": seed, "serial": True, "resources.device": here})


def trial_settings(params: Mapping[str, Any]) -> TrialSettings:
    """A trial's settings from one sampled configuration of a param_space; ConfigError names what cannot be used, and the nearest valid name."""
    search, dotted = split(params)
    return settled(base_config(search), search, dotted)


def base_config(search: Mapping[str, Any]) -> Config:
    """What the dotted settings are stacked on: the defaults with `config` and `task`, or the settings of the run `start`."""
    if not search.get("start"):
        return load(search.get("config"), [f"task={search['task']}"] if search.get("task") else [])
    for key in ("task", "config"):
        if search.get(key):
            raise ConfigError(f"{key}: got {search[key]!r} beside start={str(search['start'])!r}, whose run has settings of its own; leave one out")
    return saved_config(Path(os.path.expanduser(search["start"])))


def settled(base: Config, search: Mapping[str, Any], dotted: Mapping[str, Any]) -> TrialSettings:
    """`base` with the dotted settings, checked."""
    start = Path(os.path.expanduser(search["start"])).absolute() if search.get("start") else None
    gpus, cfg = number(search, "gpus", 0.0), base.replace(dict(dotted))
    check_family(cfg.task)
    if cfg.method != "modip":
        raise ConfigError(f"method: got {cfg.method!r}, a search is over settings of modip; compare methods with modip study")
    if start is not None:
        check_online_only(base, cfg, start)
    if gpus == 0 and cfg.resources.device.startswith("cuda"):
        raise ConfigError(f"gpus: got 0, but resources.device is {cfg.resources.device!r}; give each trial a GPU (or a fraction), or use device auto")
    if not divisible(gpus):
        raise ConfigError(f"gpus: got {gpus:g}, must be at most 1 or a whole number: Ray divides only single GPUs")
    if cfg.online.env_steps < 1:
        raise ConfigError(f"online.env_steps: got {cfg.online.env_steps}, a trial must have an online phase; set it in the search")
    steps = search.get("steps_per_iteration", max(1, cfg.online.env_steps // 5))
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ConfigError(f"steps_per_iteration: got {steps!r}, expected a positive number of environment steps")
    return TrialSettings(cfg, seeds_of(search.get("seeds", 1), cfg.seed), steps, start, number(search, "cpus", 1.0), gpus)


def split(params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(search keys, dotted settings) of a configuration; ConfigError for a key that is neither."""
    groups = [f.name for f in dataclasses.fields(Config)]
    search: dict[str, Any] = {}
    dotted: dict[str, Any] = {}
    for key, value in params.items():
        if key in OWN:
            raise ConfigError(f"{key}: cannot be set in a search: {OWN[key]}")
        if key in SEARCH_KEYS and not (key == "task" and isinstance(value, Mapping)):
            search[key] = value
        elif key.split(".")[0] in groups:
            dotted[key] = value
        else:
            known = [*SEARCH_KEYS, *groups]
            raise ConfigError(f"param_space: unknown key {key!r}{nearest(key.split('.')[0], known)} (a dotted setting such as critic.gamma, or one of "
                              f"{', '.join(SEARCH_KEYS)})")
    return search, dotted


def seeds_of(value: Any, first: int) -> tuple[int, ...]:
    """Training seeds: so many from the configuration's own seed on, or those of a list."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return tuple(range(first, first + value))
    if isinstance(value, Sequence) and not isinstance(value, str) and value and all(isinstance(s, int) and not isinstance(s, bool) and s >= 0 for s in value) \
            and len(set(value)) == len(value):
        return tuple(value)
    raise ConfigError(f"seeds: got {value!r}, expected a positive number of seeds or a list of different seeds, e.g. 3 or [0, 1, 2]")


def number(search: Mapping[str, Any], key: str, default: float) -> float:
    value = search.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
        raise ConfigError(f"{key}: got {value!r}, expected a number of at least 0")
    return float(value)


def perturbable(key: str) -> bool:
    """A search may change this setting on a trained state."""
    return belongs(key, ONLINE_ONLY + LEARNING) and key not in WHOLE_PHASE


def check_mutation(key: str, cfg: Config) -> None:
    """ConfigError where a scheduler such as PBT must not change `key` on trained states of `cfg`."""
    if not perturbable(key):
        close = nearest(key, [name for name in ONLINE_ONLY + LEARNING if not name.endswith(".")])
        raise ConfigError(f"{key}: cannot be perturbed on a trained state: it decides shapes, data, or what the offline phase did{close}; "
                          "docs/tune.md lists what can, or search it without perturbing (scheduler asha)")
    if key == "planner.horizon" and cfg.distill.target == "planned":
        raise ConfigError("planner.horizon: cannot be perturbed while distill.target is 'planned': the replay's stored plans have the old length; "
                          "use distill.target=executed, or leave the horizon alone")


def differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Names of flat settings that differ."""
    return [k for k in sorted(set(a) | set(b)) if a.get(k) != b.get(k)]


def check_online_only(saved: Config, cfg: Config, start: Path) -> None:
    """ConfigError for a setting that the pre-training in `start` was made with and this trial wants otherwise."""
    wrong = offline_differences(saved, cfg)
    if wrong:
        hint = "; search online.lr_scale instead" if wrong[0].endswith(".lr") else ""
        raise ConfigError(f"{wrong[0]}: the pre-training in {start} was made with {flat(saved).get(wrong[0])!r}, "
                          f"this trial asks for {flat(cfg).get(wrong[0])!r}{hint}; "
                          "with 'start' only settings of the online phase can differ")


def check_goes_on(saved: Config, cfg: Config, where: Path) -> None:
    """ConfigError for a setting that differs from those of a checkpoint and must not."""
    a, b = flat(saved), flat(cfg)
    for key in differing(a, b):
        try:
            if not belongs(key, ELSEWHERE):
                check_mutation(key, cfg)
        except ConfigError as error:
            raise ConfigError(f"{where}: was trained with {key}={a.get(key)!r}, this trial has {b.get(key)!r}. {error}") from error
