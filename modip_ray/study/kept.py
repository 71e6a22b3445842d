"""What stays of a study's finished runs: a few small files each, in a folder that can be under version control (kept: of the study's file).

A study goes on from them where its run folders are gone: runs found there are not run again, and are in its tables and curves.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
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
    """Copy a finished run's settings, summary and evaluations; the summary last, as it says that all is there."""
    if cell.kept is None or cell.start is None:
        return
    cell.kept.mkdir(parents=True, exist_ok=True)
    write_synced(cell.kept / "config.yaml", (cell.folder / "config.yaml").read_text())
    write_synced(cell.kept / "metrics.jsonl", "".join(f"{json.dumps(row)}\n" for row in evaluations(cell.folder)))
    write_synced(cell.kept / "summary.json", json.dumps(read_summary(cell.folder), indent=1))


def keep_results(study: Study, pictures: Sequence[str]) -> None:
    """results.json as the kept folder's name with .json, for who reads it by program; table and curves into that folder."""
    folder = Path(str(study.kept))
    folder.mkdir(parents=True, exist_ok=True)
    write_synced(folder.with_suffix(".json"), (study.folder / "results.json").read_text())
    for name in ("results.md", *pictures):
        shutil.copyfile(study.folder / name, folder / name)


def evaluations(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics that learning curves are made of, less those that a resume made void."""
    try:
        return [row for row in live_rows(read_metrics(folder)) if row["kind"] == "eval"]
    except FileNotFoundError:
        return []
