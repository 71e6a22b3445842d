"""YAML as data: strict where the format is lax."""

from __future__ import annotations

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
