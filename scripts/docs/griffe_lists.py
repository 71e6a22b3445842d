"""Docstrings of this project explain arguments in aligned lines, `name : text`; on the site they are a list."""
import re

import griffe

ENTRY = re.compile(r"^(?P<name>\w+(?:, \w+)*)\s+: (?P<text>.*)$")


class AlignedLists(griffe.Extension):
    """mkdocs.yml: plugins, mkdocstrings, handlers, python, options, extensions."""

    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring is not None:
            obj.docstring.value = with_lists(obj.docstring.value)


def with_lists(text: str) -> str:
    found, inside = [], False
    for line in text.splitlines():
        entry = ENTRY.match(line)
        if entry:
            found += ([] if inside else [""]) + [f"- `{entry['name']}`: {entry['text']}"]
        elif inside and line and not line.startswith(" "):
            found += ["", line]
        else:
            found.append(line)
        inside = bool(entry) or (inside and line.startswith(" "))
    return "\n".join(found)
