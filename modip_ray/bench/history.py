"""Earlier results of `modip bench`, beside the new ones, so that a regression shows."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from modip_ray.bench.rows import Row

FOLDER = Path("results/bench")
DATE = re.compile(r"\d{4}-\d\d-\d\d")
WORSE = 0.75                        # of what was reached before; short measurements on a busy machine differ by less


class Earlier(NamedTuple):
    figure: float
    unit: str
    file: str


def figure(row: Row) -> float:
    """What is compared: the ratio to the reference of the same run, which another machine changes little; else the value."""
    return row.value if row.ratio is None else row.ratio


def earlier(folder: Path = FOLDER) -> dict[str, Earlier]:
    """By a row's name, its figure in the newest file that has it. Files carry the date in their names; others are left out."""
    found: dict[str, Earlier] = {}
    for path in sorted((p for p in folder.glob("*.json") if DATE.search(p.name)), key=lambda p: (DATE.search(p.name)[0], p.name)):
        for row in json.loads(path.read_text())["rows"]:
            found[row["name"]] = Earlier(figure(Row(**row)), row["unit"], path.name)
    return found


def regressions(rows: Sequence[Row], before: Mapping[str, Earlier]) -> list[str]:
    """A line for each row that does worse than WORSE of what it did: times in ms are better smaller, rates (.../s) larger."""
    lines = []
    for row in rows:
        old = before.get(row.name)
        if old is None or old.unit != row.unit or not (row.unit == "ms" or row.unit.endswith("/s")):
            continue
        better = old.figure / figure(row) if row.unit == "ms" else figure(row) / old.figure
        if better < WORSE:
            lines.append(f"worse than before: {row.name}: {figure(row):.3g}, it was {old.figure:.3g} in {old.file}")
    return lines
