"""The driver of `modip study`: every cell is the ordinary train command, what is done is skipped, what was cut off goes on."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from modip_ray.learning.checkpoint import write_synced
from modip_ray.learning.evaluation import modes_of
from modip_ray.report.scores import duration, number
from modip_ray.runfolder import RunError, check_same, command_line, disk_errors, is_open, locked, read_summary, saved_config_tree
from modip_ray.session import StopSignals
from modip_ray.study.kept import keep, others_kept, outcome
from modip_ray.study.spec import Cell, Study
from modip_ray.study.table import write_results

POLL_S = 0.5


@dataclass
class Running:
    cell: Cell
    process: subprocess.Popen
    began: float


def run_study(study: Study) -> dict[str, Any] | None:
    """Run, or go on running; returns what results.json holds, None where it was stopped. RunError at the end names the runs that failed."""
    cells = study.cells()
    for cell in cells:
        earlier = saved_config_tree(cell.folder)
        if earlier is not None:
            check_same(earlier, cell.cfg, cell.folder)
    with opened(study), StopSignals(grace_s=0.0) as stop:                      # each run keeps to its own log.grace_s
        done = {c.name: folder for c in cells if (folder := outcome(c)) is not None}
        for cell in cells:
            if done.get(cell.name) == cell.folder:                                     # it ended when no driver looked
                keep(cell)
        todo = [c for c in cells if c.name not in done]
        todo = [c for c in todo if c.start is not None or any(other.start == c for other in todo)]       # a start that nobody waits for is not needed
        print(f"study {study.folder}: {len(cells)} runs, {len(todo)} to do", flush=True)
        others = others_kept(todo)
        if others:
            print(f"{study.kept} keeps runs of other settings, which stay: {', '.join(others)}. Remove those that the new ones shall replace", flush=True)
        failed = run_cells(todo, study.at_once, stop)
        found = write_results(study)
        if stop.asked:
            print(f"stopped; the same command goes on: {command_line()}")
            return None
    if failed:
        raise RunError(f"{len(failed)} of {len(cells)} runs failed: {', '.join(c.name for c in failed)}; see their log.txt (the same command tries them again)")
    return found


def run_cells(todo: Sequence[Cell], at_once: int, stop: StopSignals) -> list[Cell]:
    """Run them, at most `at_once` at a time; returns those that failed, or could not begin as their start failed. A stop, or whatever else ends this
    process but SIGKILL, has each save and exit, and waits for that, unless it is a second Ctrl-C. One that another process still runs, for a driver that was
    killed, is waited for.
    """
    waiting, running, failed, told = list(todo), [], [], set()
    try:
        while running or waiting:
            if stop.asked:
                waiting = []
                end(running)
            for one in [r for r in running if r.process.poll() is not None]:
                running.remove(one)
                if not note(one, stop.asked):
                    failed.append(one.cell)
            failed += [c for c in waiting if c.start in failed]
            waiting = [c for c in waiting if c not in failed]
            ready = [c for c in waiting if c.start is None or outcome(c.start) is not None]
            others = {c.name: c for c in ready if is_open(c.folder)}
            for name in others.keys() - told:
                print(f"{time.strftime('%H:%M')} {name} is run by another process, of an earlier driver perhaps; waiting for it", flush=True)
            told |= others.keys()
            ready = [c for c in ready if c.name not in others]
            if ready and len(running) + len(others) < at_once:
                waiting.remove(ready[0])
                running.append(launched(ready[0]))
            elif running or waiting:
                time.sleep(POLL_S)
    except BaseException as error:
        end(running, wait=not isinstance(error, KeyboardInterrupt))
        raise
    return failed


def end(running: Sequence[Running], wait: bool = True) -> None:
    """Have each save and exit; all are told before one is waited for."""
    for one in running:
        if one.process.poll() is None:
            one.process.send_signal(signal.SIGTERM)
    for one in running if wait else ():
        one.process.wait()


def launched(cell: Cell) -> Running:
    """`modip train` with the cell's settings, as a file in its folder; what it prints goes to log.txt there."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    settings = cell.folder / "settings.yaml"
    write_synced(settings, cell.cfg.dump())
    print(f"{time.strftime('%H:%M')} {cell.name}", flush=True)
    with open(cell.folder / "log.txt", "a") as log:
        process = subprocess.Popen([sys.executable, "-m", "modip_ray", "train", "--config", str(settings)], stdout=log, stderr=subprocess.STDOUT,
                                   start_new_session=True)
    return Running(cell, process, time.monotonic())


def note(one: Running, stopped: bool) -> bool:
    """Say how a run ended; False for one that failed."""
    head, took = f"{time.strftime('%H:%M')} {one.cell.name}", duration(time.monotonic() - one.began)
    if outcome(one.cell) is not None:
        keep(one.cell)
        scores = read_summary(one.cell.folder)["scores"]
        shown = ", ".join(f"{mode} {number(scores[mode]['mean'])}" for mode in modes_of(one.cell.cfg))
        print(f"{head} done in {took}: {shown}", flush=True)
    elif stopped and one.process.returncode in (0, -signal.SIGTERM):        # the latter: it had not come to listen for it
        print(f"{head} stopped after {took}", flush=True)
    else:
        lines = (one.cell.folder / "log.txt").read_text(errors="replace").strip().splitlines() or ["(nothing was printed)"]
        print(f"{head} FAILED with exit code {one.process.returncode} after {took}: {lines[-1]}", flush=True)
        return False
    return True


@contextmanager
def opened(study: Study) -> Iterator[None]:
    """The study's folder for this process alone."""
    folder, busy = study.folder, "another process runs the study in this folder; wait for it, stop it, or give another out=..."
    with locked(folder, "out", busy), disk_errors(folder, "the same command goes on"):
        write_synced(folder / "study.yaml", study.dump())
        yield
