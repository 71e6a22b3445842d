"""YAML as data: strict where the format is lax."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from modip_ray.config.rules import ConfigError, shown
from modip_ray.oneline import first_line


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(), OnceLoader)
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: cannot be read as YAML data: {yaml_problem(e)}") from e
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping of settings, got {type(tree).__name__}")
    return tree


def dump_yaml(tree: dict[str, Any]) -> str:
    """What `read_yaml` reads as the same tree."""
    return yaml.dump(tree, Dumper=OnceDumper, sort_keys=False)


def parse_scalar(text: str) -> Any:
    """The value of a key=value: a YAML scalar, or a mapping or list."""
    try:
        return yaml.load(text, OnceLoader)
    except yaml.YAMLError as e:
        raise ConfigError(f"cannot read the value {shown(text)}: {yaml_problem(e)}") from e


class OnceLoader(yaml.SafeLoader):
    """YAML data, in which a key that is given twice is an error, as the first one would be dropped without a word, a day is text, as it names a folder, and
    1e-4 and 1.3e9 are numbers wherever they stand (YAML 1.1 asks for a point and a sign: 1.0e-4)."""

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


class OnceDumper(yaml.SafeDumper):
    """Puts text in quotes that OnceLoader would read as a number."""


for reader_or_writer in (OnceLoader, OnceDumper):
    reader_or_writer.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"), list("-+.0123456789"))


def yaml_problem(error: Exception) -> str:
    """One line of what YAML says in several."""
    problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
    return (problem or first_line(error)) + (f" (line {mark.line + 1}, column {mark.column + 1})" if mark is not None else "")
