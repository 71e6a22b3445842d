"""Where settings come from: default.yaml <- configs/tasks/<task>.yaml <- --config file <- dotted overrides, later ones winning."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from modip_ray.config.fields import Config, build
from modip_ray.config.rules import ConfigError, shown
from modip_ray.config.tree import merge, nearest, set_dotted, stacked
from modip_ray.config.yaml_data import parse_scalar, read_yaml


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


def task_names() -> list[str]:
    return sorted(p.stem for p in (config_dir() / "tasks").glob("*.yaml"))


def defaults() -> dict[str, Any]:
    """default.yaml's tree, to be changed at will: the file is parsed once."""
    return copy.deepcopy(parsed(config_dir() / "default.yaml"))


@cache
def parsed(path: Path) -> dict[str, Any]:
    return read_yaml(path)


def config_dir() -> Path:
    """The folder of shipped configurations: inside an installed package, or beside the package in a checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / "default.yaml").is_file():
            return folder
    raise ConfigError(f"configs/default.yaml was found neither in {package} nor in {package.parent}; reinstall modip_ray")
