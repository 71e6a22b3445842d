"""configs/default.yaml as a page: name, default, type, comment; and the rule that every field has a comment above it.

    python scripts/docs/settings.py [FILE ...]          # checks the rule (pre-commit); the file itself is configs/default.yaml
"""
import dataclasses
import html
import re
import sys
import types
import typing
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
DEFAULT = ROOT / "configs" / "default.yaml"
LINE = re.compile(r"(?P<indent> *)(?P<key>\w+):(?: +(?P<value>.*))?$")


class SettingsError(ValueError):
    """The file breaks the rule; the message names file, line and field."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """One field: its dotted name, its default as it stands in the file, the comment above it in one line."""

    name: str
    default: str
    comment: str


def read_settings(path: Path = DEFAULT) -> list[Setting]:
    """All fields in the file's order. SettingsError at the first one without a comment right above it."""
    found, group, comment = [], "", []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        text = line.strip()
        match = LINE.match(line)
        if text.startswith("#"):
            comment.append(text.removeprefix("#").strip())
            continue
        if match and not match["indent"]:
            group = ""
        if match and match["value"] is None:
            group = f"{match['key']}."
        elif match:
            name = group + match["key"]
            if not comment:
                raise SettingsError(f"{path.name}:{number}: {name} has no comment above it; say what it does, its unit, and what else it may be")
            found.append(Setting(name, match["value"], " ".join(comment)))
        elif text:
            raise SettingsError(f"{path.name}:{number}: expected `name: value` on one line or a comment, got {text!r}")
        comment = []
    check_complete(path, [s.name for s in found])
    return found


def check_complete(path: Path, names: list[str]) -> None:
    """The lines hold what YAML reads: no field is hidden in another one's value."""
    tree = yaml.safe_load(path.read_text())
    held = [f"{k}.{n}" for k, v in tree.items() if isinstance(v, dict) for n in v] + [k for k, v in tree.items() if not isinstance(v, dict)]
    if sorted(held) != sorted(names):
        raise SettingsError(f"{path.name}: {', '.join(sorted({*held} ^ {*names}))}: each field must stand on a line of its own, groups on the level above")


def type_text(name: str) -> str:
    """What a field accepts, e.g. `int`, `mlp | unet`."""
    from modip_ray.config import Config
    kind: typing.Any = Config
    for part in name.split("."):
        kind = typing.get_type_hints(kind)[part]
    return spelled(kind)


def spelled(kind: typing.Any) -> str:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return " | ".join(str(a).lower() if isinstance(a, bool) else str(a) for a in args)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(spelled(a) for a in args)
    if dataclasses.is_dataclass(kind):
        return "{" + ", ".join(f.name for f in dataclasses.fields(kind)) + "}"
    return {type(None): "null", bool: "true | false", str: "text", dict: "mapping"}.get(kind, kind.__name__)


def page() -> str:
    """The settings page, Markdown; one definition a field."""
    lines = ["# Settings", "", "All settings of a run, as `configs/default.yaml` has them. A run's settings are this file, then `configs/tasks/TASK.yaml`,",
             "`--config FILE`, and `key=value` on the command line; later ones win. An unknown key or a wrong type is an error that names",
             "the nearest key.", ""]
    group = None
    for setting in read_settings():
        section = setting.name.rpartition(".")[0]
        if section != group:
            group = section
            lines += [f"## {section or 'the run'}", ""]
        lines += [f"`{setting.name}` = `{setting.default}`", f":   <small>{type_text(setting.name)}</small>  ", f"    {escaped(setting.comment)}", ""]
    return "\n".join(lines)


def escaped(comment: str) -> str:
    """Comments are plain text: what Markdown or HTML would take for its own is written out."""
    return re.sub(r"([*\[\]])", r"\\\1", html.escape(comment, quote=False))


def main() -> None:
    try:
        for path in map(Path, sys.argv[1:] or [str(DEFAULT)]):
            read_settings(path)
    except SettingsError as error:
        sys.exit(f"settings: {error}")


if __name__ == "__main__":
    main()
