"""`modip status RUN`: how a run stands, out of its folder; works for one that runs, was stopped or is finished, on any machine that sees the folder."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from modip_ray.cli.arguments import command

CLEAR = "\x1b[H\x1b[J"


def add_parser(commands) -> None:
    text = "how a run stands: progress, scores, workers, where the time goes, checkpoint"
    p = command(commands, "status", run_status, text)
    p.add_argument("run_folder", type=Path, metavar="RUN")
    p.add_argument("--watch", type=seconds, metavar="SECONDS", help="show it again and again, until the run is finished or Ctrl-C")
    p.add_argument("--json", action="store_true", dest="as_json", help="the facts as JSON, an object a line with --watch")


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.1 <= value <= 86400:
        raise argparse.ArgumentTypeError(f"expected seconds from 0.1 to 86400, got {text!r}")
    return value


def run_status(args: argparse.Namespace) -> int:
    terminal = sys.stdout.isatty()
    try:
        while True:
            facts = gather(args.run_folder)
            if args.as_json:
                print(json.dumps(facts, default=dataclasses.asdict, indent=None if args.watch else 1), flush=True)
            else:
                show(facts, terminal, clear=terminal and args.watch is not None)
            if args.watch is None or facts["state"] == "finished":
                return 0
            time.sleep(args.watch)
    except KeyboardInterrupt:
        return 0


def show(facts: dict[str, Any], terminal: bool, clear: bool) -> None:
    from modip_ray.report.status import status_text
    color = terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    text = status_text(facts, shutil.get_terminal_size().columns, color)
    print(CLEAR + text if clear else text + "\n" * (not terminal), flush=True)


def gather(folder: Path) -> dict[str, Any]:
    """All facts of a run folder. RunError where it is none, or a file in it cannot be read."""
    from modip_ray.report.metrics import FILE_NAME
    from modip_ray.report.rundata import RunData, load_run
    from modip_ray.report.status import facts_of
    from modip_ray.runfolder import RunError, is_open, saved_config_tree
    if saved_config_tree(folder) is None:
        raise RunError(f"{folder}: no config.yaml there; expected a run folder as written by 'modip train run_dir=...'")
    log = folder / FILE_NAME
    try:
        run = load_run(folder) if log.is_file() else RunData(folder, [], [], {}, {}, folder / "report")
    except ValueError as error:
        raise RunError(str(error)) from error
    facts = facts_of(run, is_open(folder))
    command = f"modip train --config {shlex.quote(str(folder / 'config.yaml'))} run_dir={shlex.quote(str(folder))}"
    return {"run": str(folder), **facts, "row_age_s": max(0.0, time.time() - log.stat().st_mtime) if run.rows else None,
            "checkpoint": checkpoint_of(folder / "checkpoints"), "resume": command if facts["state"] == "stopped" else None}


def checkpoint_of(root: Path) -> dict[str, Any] | None:
    """The newest complete checkpoint: name, age, size and counters (sums are not verified: that reads all of it)."""
    from modip_ray.learning.checkpoint import COUNTERS, DONE, folders
    for folder in folders(root):
        try:
            age, size = time.time() - (folder / DONE).stat().st_mtime, sum(p.stat().st_size for p in folder.iterdir())
            counters = json.loads((folder / COUNTERS).read_text())
        except (FileNotFoundError, ValueError):                                     # just being removed, or damaged
            continue
        return {"name": folder.name, "age_s": max(0.0, age), "mb": size / 1e6, **{k: counters.get(k) for k in ("phase", "env_steps", "updates")}}
    return None
