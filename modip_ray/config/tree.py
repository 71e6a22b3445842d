"""Trees of settings (nested dicts): stacked, overridden and given types, strictly. An unknown key or a wrong type names the nearest key and the type."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Sequence
from typing import Any, Literal

from modip_ray.config.rules import ConfigError, shown
from modip_ray.config.yaml_data import parse_scalar

FREE_FORM = ("env_kwargs", "placement", "num_workers")      # a file's replaces that below it whole: the keys are the user's, or it may be a number


def stacked(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Both mappings, group by group; where both have a setting, `above` counts."""
    both = {k: stacked(below[k], v) if isinstance(v, dict) and isinstance(below.get(k), dict) and k not in FREE_FORM else v for k, v in above.items()}
    return below | both


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
    """Set one key of `tree` in place. A key below one of FREE_FORM is set in a copy of the mapping there, whose other keys stay."""
    parts = dotted.split(".")
    end = next((i for i, part in enumerate(parts, 1) if part in FREE_FORM), len(parts))
    there: Any = tree
    for part in parts[:end]:
        there = there.get(part) if isinstance(there, dict) else None
    layer = with_entry(there, parts[end:], value)
    for part in reversed(parts[:end]):
        layer = {part: layer}
    merge(tree, layer, "override")


def with_entry(there: Any, path: Sequence[str], value: Any) -> Any:
    """`value`, or a copy of the mapping `there` (an empty one where it is none) that has it at `path`."""
    if not path:
        return value
    below = there if isinstance(there, dict) else {}
    return {**below, path[0]: with_entry(below.get(path[0]), path[1:], value)}


def nearest(key: str, allowed: Sequence[str]) -> str:
    close = difflib.get_close_matches(key, allowed, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


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
        value = parse_scalar(value)                                                 # 1e-4 in quotes, or a program's
        ok = isinstance(value, float)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if not ok or (kind is float and not math.isfinite(value)):
        raise ConfigError(f"{where}: expected {'a finite ' if ok else ''}{kind.__name__}, got {shown(value)} ({type(value).__name__})")
    return value
