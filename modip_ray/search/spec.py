"""A search file (configs/tune/*.yaml): what `modip tune` reads. Data only, strict like config/; no Ray."""

from __future__ import annotations

import dataclasses
import os
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from modip_ray.config import ConfigError, config_dir, nearest, parse_scalar, read_yaml
from modip_ray.config.rules import need
from modip_ray.config.tree import typed

#: Kinds of an entry of `search`, with what they are given.
RANGES = {"choice": "a list of values", "grid": "a list of values, each tried num_samples times", "uniform": "[low, high]", "loguniform": "[low, high]",
          "quniform": "[low, high, step]", "randint": "[low, high], high excluded"}
METRICS = [f"{mode}/{name}" for mode in ("mpc", "policy") for name in ("mean", "normalized", "return")]
PARTS = ("ci95", "by_seed")          # of a report, beside each of them
SIZES = {"uniform": 2, "loguniform": 2, "quniform": 3, "randint": 2}


@dataclass(frozen=True)
class Asha:
    """Asynchronous successive halving: at grace_period, and each reduction_factor times later, the best 1/reduction_factor go on."""

    kind: Literal["asha"] = "asha"
    grace_period: int = 1
    reduction_factor: float = 3.0
    brackets: int = 1


@dataclass(frozen=True)
class Pbt:
    """Population-based training: every perturbation_interval iterations the worst take over state and (perturbed) settings of the best."""

    kind: Literal["pbt"] = "pbt"
    perturbation_interval: int = 1
    quantile_fraction: float = 0.25
    resample_probability: float = 0.25
    synch: bool = False


@dataclass(frozen=True)
class Every:
    """Every trial runs to its end."""

    kind: Literal["none"] = "none"


SCHEDULERS = {"asha": Asha, "pbt": Pbt, "none": Every}


@dataclass(frozen=True)
class Search:
    """One search. `settings` and `search` have dotted settings of a run as keys; see configs/tune/guard_asha.yaml for every field."""

    out: str | None = None
    task: str | None = None
    config: str | None = None
    start: str | None = None
    settings: dict = field(default_factory=dict)
    search: dict = field(default_factory=dict)
    metric: str = "mpc/mean"
    mode: Literal["max", "min"] = "max"
    scheduler: Asha | Pbt | Every = field(default_factory=Asha)
    num_samples: int = 8
    seed: int = 0
    seeds: int | list = 1
    iterations: int = 5
    steps_per_iteration: int = 4000
    cpus: float = 1.0
    gpus: float = 0.0
    max_concurrent: int | None = None
    ray_address: str = "local"

    @property
    def folder(self) -> Path:
        return Path(os.path.expanduser(str(self.out))).resolve()

    def params(self) -> dict[str, Any]:
        """The fixed part of the param_space."""
        fixed = {"task": self.task, "config": self.config, "start": self.start, "seeds": self.seeds, "steps_per_iteration": self.steps_per_iteration,
                 "cpus": self.cpus, "gpus": self.gpus, "online.env_steps": self.iterations * self.steps_per_iteration}
        return {k: v for k, v in fixed.items() if v is not None} | self.settings

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def dump(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


def beside(metric: str, part: str) -> str:
    """Key in a flat report of a metric's interval or seeds: "mpc/ci95" of "mpc/mean", "mpc/return_ci95" of "mpc/return"."""
    mode, name = metric.split("/")
    return f"{mode}/{part}" if name == "mean" else f"{metric}_{part}"


def load_search(file: str | Path, overrides: Sequence[str] = ()) -> Search:
    """A search file with key=value on top: num_samples=4, scheduler.grace_period=2, settings.critic.gamma=0.98, search.guard.trust='{uniform: [0, 1]}'."""
    path = find_search(file)
    tree = read_yaml(path)
    for item in overrides:
        key, sep, text = item.partition("=")
        if not sep or not key:
            raise ConfigError(f"override {item!r} is not of the form key=value, e.g. num_samples=4")
        group, dot, name = key.partition(".")
        if not dot:
            tree[key] = parse_scalar(text)
        elif group in ("settings", "search", "scheduler"):
            tree[group] = {**(tree.get(group) or {}), name: parse_scalar(text)}
        else:
            raise ConfigError(f"override {item!r}: only settings, search and scheduler have fields of their own; a setting of the run is settings.{key}=...")
    return build_search(tree, str(path), path.stem)


def find_search(file: str | Path) -> Path:
    """A path as given, or the name of a file under configs/tune."""
    folder = config_dir() / "tune"
    for path in (Path(file), folder / file, folder / f"{file}.yaml"):
        if path.is_file():
            return path
    names = sorted(p.stem for p in folder.glob("*.yaml"))
    raise ConfigError(f"no search {str(file)!r}{nearest(Path(file).stem, names)}: not a file, and {folder} holds {', '.join(names)}")


def build_search(tree: Mapping[str, Any], source: str, name: str) -> Search:
    """Types and ranges checked; `name`: the folder's name where the file gives none."""
    names = [f.name for f in dataclasses.fields(Search)]
    for key in tree:
        if key not in names:
            raise ConfigError(f"{source}: unknown field {key!r}{nearest(str(key), names)} (allowed here: {', '.join(names)})")
    scheduler = tree.get("scheduler", {"kind": "asha"})
    if not isinstance(scheduler, Mapping) or scheduler.get("kind") not in SCHEDULERS:
        raise ConfigError(f"{source}: scheduler: got {scheduler!r}, expected a mapping with kind: {', '.join(SCHEDULERS)}, e.g. {{kind: asha}}")
    kind, hints, given = SCHEDULERS[scheduler["kind"]], typing.get_type_hints(Search), {**Search().to_dict(), **tree}
    fields = {n: typed(hints[n], given[n], n) for n in names if n not in ("scheduler", "seeds")}
    fields["out"] = fields["out"] or f"runs/tune/{name}"
    search = Search(**fields, scheduler=typed(kind, {**dataclasses.asdict(kind()), **scheduler}, "scheduler."), seeds=given["seeds"])
    check(search)
    return search


def check(search: Search) -> None:
    """Ranges of the fields; what the settings themselves allow is `space.check_space`."""
    for name in ("num_samples", "iterations", "steps_per_iteration", "cpus"):
        need(getattr(search, name) > 0, name, getattr(search, name), "must be positive")
    need(search.max_concurrent is None or search.max_concurrent > 0, "max_concurrent", search.max_concurrent, "must be positive, or null for no limit")
    if search.metric not in METRICS:
        raise ConfigError(f"metric: got {search.metric!r}, allowed: {', '.join(METRICS)}{nearest(search.metric, METRICS)}")
    need("online.env_steps" not in {**search.settings, **search.search}, "online.env_steps", "a value of its own",
         "is iterations x steps_per_iteration in a search; set those")
    need(bool(search.search), "search", search.search, "must name at least one setting to search")
    for key, entry in search.search.items():
        need(key not in search.settings, f"search.{key}", entry, "is fixed under 'settings' as well; remove it from one of them")
        check_range(key, entry)
    s = search.scheduler
    if isinstance(s, Asha):
        need(1 <= s.grace_period <= search.iterations, "scheduler.grace_period", s.grace_period, f"must lie in 1..iterations={search.iterations}")
        need(s.reduction_factor > 1, "scheduler.reduction_factor", s.reduction_factor, "must be above 1")
        need(s.brackets >= 1, "scheduler.brackets", s.brackets, "must be at least 1")
    if isinstance(s, Pbt):
        need(s.perturbation_interval >= 1, "scheduler.perturbation_interval", s.perturbation_interval, "must be at least 1")
        need(0 < s.quantile_fraction <= 0.5, "scheduler.quantile_fraction", s.quantile_fraction, "must lie in 0..0.5, 0 excluded")
        need(0 <= s.resample_probability <= 1, "scheduler.resample_probability", s.resample_probability, "must lie in 0..1")


def check_range(key: str, entry: Any) -> None:
    """`entry` is {kind: arguments} as RANGES says."""
    kinds = ", ".join(f"{{{k}: {v}}}" for k, v in RANGES.items())
    if not isinstance(entry, Mapping) or len(entry) != 1:
        raise ConfigError(f"search.{key}: got {entry!r}, expected one of {kinds}; a fixed value belongs under 'settings'")
    kind, values = next(iter(entry.items()))
    if kind not in RANGES:
        raise ConfigError(f"search.{key}: unknown kind {kind!r}{nearest(str(kind), list(RANGES))}; expected one of {kinds}")
    if not isinstance(values, list) or not values or len(values) != SIZES.get(kind, len(values)):
        raise ConfigError(f"search.{key}: {kind} takes {RANGES[kind]}, got {values!r}")
    if kind in SIZES:
        numbers = [parse_scalar(v) if isinstance(v, str) else v for v in values]    # YAML 1.1 reads 1e-4 as text
        whole = int if kind == "randint" else (int, float)
        if not all(isinstance(v, whole) and not isinstance(v, bool) for v in numbers) or not numbers[0] < numbers[1]:
            raise ConfigError(f"search.{key}: {kind} takes {RANGES[kind]} with low below high, got {values!r}")
        need(kind != "loguniform" or numbers[0] > 0, f"search.{key}", values, "must be positive for loguniform")
        need(kind != "quniform" or numbers[2] > 0, f"search.{key}", values, "must have a positive step")
        values[:] = numbers
