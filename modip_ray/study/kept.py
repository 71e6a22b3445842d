"""What stays of a study's finished runs: a few small files each, in a folder that can be under version control (kept: of the study's file).

A study goes on from them where its run folders are gone: runs found there are not run again, and are in its tables and curves.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modip_ray.config import ConfigError
from modip_ray.learning.checkpoint import write_synced
from modip_ray.report.metrics import live_rows, read_metrics
from modip_ray.runfolder import read_summary, saved_config
from modip_ray.study.spec import Cell, Study


def outcome(cell: Cell) -> Path | None:
    """Where the summary and evaluations of a run by these very settings are; None where it is not finished."""
    summary = read_summary(cell.folder)
    if summary is not None and summary.get("config_hash") == cell.cfg.hash():
        return cell.folder
    return cell.kept if cell.kept is not None and kept_settings(cell.kept) == cell.cfg.hash() else None


def kept_settings(folder: Path) -> str | None:
    """Hash of the settings that a kept run had, with the defaults of those that came later; None where nothing that can be used is kept."""
    try:
        return saved_config(folder).hash() if (folder / "summary.json").is_file() and (folder / "config.yaml").is_file() else None
    except ConfigError:                                                             # a setting of then is gone
        return None


def keep(cell: Cell) -> None:
    """Copy a finished run's settings, summary and evaluations; the summary last, as it says that all is there. What is kept of other settings stays."""
    if cell.kept is None or cell.start is None or kept_settings(cell.kept) is not None:
        return
    cell.kept.mkdir(parents=True, exist_ok=True)
    write_synced(cell.kept / "config.yaml", (cell.folder / "config.yaml").read_text())
    write_synced(cell.kept / "metrics.jsonl", "".join(f"{json.dumps(row)}\n" for row in evaluations(cell.folder)))
    write_synced(cell.kept / "summary.json", json.dumps(read_summary(cell.folder), indent=1))


def keep_results(study: Study, found: Mapping[str, Any], pictures: Sequence[str]) -> None:
    """results.json as the kept folder's name with .json, for who reads it by program; table and curves into that folder. Not where those that are there
    tell of more runs, of settings, tasks or seeds that this study was not given: that is said.
    """
    folder = study.kept_folder
    before = lost_runs(folder.with_suffix(".json"), found)
    if before:
        print(f"modip: {folder.with_suffix('.json')} stays as it is: it has what this study has not ({', '.join(before)}). Give the settings that those runs "
              f"were made with, or remove it. The table of this study is {study.folder / 'results.md'}", file=sys.stderr)
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_synced(folder.with_suffix(".json"), (study.folder / "results.json").read_text())
    for name in ("results.md", *pictures):
        shutil.copyfile(study.folder / name, folder / name)


def lost_runs(path: Path, found: Mapping[str, Any]) -> list[str]:
    """Tasks and methods of an earlier results.json that had more training seeds than now; a file that cannot be read has more than anybody knows."""
    def seeds(tree: Mapping[str, Any]) -> dict[str, int]:
        return {f"{task}/{method}": entry["seeds_done"] for method, tasks in tree["methods"].items() for task, entry in tasks.items()}
    if not path.is_file():
        return []
    try:
        before, now = seeds(json.loads(path.read_text())), seeds(found)
    except (ValueError, KeyError, TypeError, AttributeError):
        return ["something that no study writes"]
    return sorted(name for name, n in before.items() if now.get(name, 0) < n)


def others_kept(cells: Sequence[Cell]) -> list[str]:
    """Runs of other settings that are kept in the places of these."""
    return [c.name for c in cells if c.kept is not None and c.start is not None and kept_settings(c.kept) not in (None, c.cfg.hash())]


def evaluations(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics that learning curves are made of, less those that a resume made void."""
    try:
        return [row for row in live_rows(read_metrics(folder)) if row["kind"] == "eval"]
    except FileNotFoundError:
        return []
