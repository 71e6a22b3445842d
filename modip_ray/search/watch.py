"""What the driver of a search does at Tune's events: short lines on the terminal, and the state of ASHA kept for a resume."""

from __future__ import annotations

import logging
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray.tune import Callback
from ray.tune.experiment import Trial
from ray.tune.logger import JsonLoggerCallback
from ray.tune.schedulers import ASHAScheduler
from ray.tune.utils import flatten_dict

from modip_ray.report.scores import interval, number
from modip_ray.runfolder import RunError
from modip_ray.search.report import TRIALS, cell, trial_number
from modip_ray.search.spec import beside

TUNER = "tuner.pkl"                 # Tune's name for its description of a search


def number_of(trial: Trial) -> int:
    """0, 1, ... in the order of drawing; the same after a restart from zero, when Tune gives the trial another id."""
    return int(re.match(r"\d+", trial.experiment_tag)[0])


def folder_name(trial: Trial) -> str:
    return f"trial_{number_of(trial):03d}_{trial.trial_id[:5]}"


class Lines(Callback):
    """One line for each report, takeover and failure."""

    def __init__(self, metric: str, mode: str, iterations: int):
        self.metric, self.sign, self.iterations = metric, 1.0 if mode == "max" else -1.0, iterations
        self.tags: dict[str, str] = {}

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial whose settings were perturbed begins again: from whom it has its state, and with what."""
        tag = trial.experiment_tag or ""
        if "@perturbed" in tag and self.tags.get(trial.trial_id) != tag and trial.checkpoint is not None:
            self.tags[trial.trial_id] = tag
            changed = ", ".join(f"{k}={cell(trial.config[k])}" for k in trial.evaluated_params)
            print(f"trial {number_of(trial)}: goes on from trial {trial_number(Path(trial.checkpoint.path).parent)} with {changed}", flush=True)

    def on_trial_result(self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any) -> None:
        flat = flatten_dict(result)
        done = {t: flatten_dict(t.last_result).get(self.metric) for t in trials} | {trial: flat[self.metric]}
        best = max((t for t, v in done.items() if v is not None), key=lambda t: self.sign * done[t])
        at = flat["training_iteration"]
        ci = flat.get(beside(self.metric, "ci95"))
        line = f"trial {number_of(trial)}: {at} of {self.iterations}  {flat['env_steps']:,} steps  {self.metric} {number(flat[self.metric])}"
        line += f" [{interval(ci)}]" if ci else ""
        line += f"  best so far {number(done[best])} (trial {number_of(best)})"
        stopped = flat.get("done") and at < self.iterations
        print(line + ("  stopped here" if stopped else ""), flush=True)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        print(f"trial {number_of(trial)}: failed: {last_line(trial.get_error())}", flush=True)


class Rows(JsonLoggerCallback):
    """result.json of each trial. Ray's own fetches the stored copy whenever a trial begins again, over rows that are not stored yet: PBT would lose some."""

    def _restore_from_remote(self, file_name: str, trial: Trial) -> None:
        path = Path(trial.local_path, file_name)
        if not path.exists():
            super()._restore_from_remote(file_name, trial)
        elif not path.read_bytes().endswith(b"\n") and path.stat().st_size:          # cut short by a full disk, or a power cut: the next row begins a line
            with path.open("ab") as file:
                file.write(b"\n")


def last_line(error: BaseException | None) -> str:
    """What an error says, less the traceback that Ray puts before it."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


@contextmanager
def quiet() -> Iterator[None]:
    """Tune's loggers without the tracebacks of failed trials (`Lines` says why a trial failed, its folder's error.txt has the rest).

    RunError where Tune could not read its saved state: by itself it would only log that, and begin again from zero.
    """
    def keep(record: logging.LogRecord) -> bool:
        if record.getMessage().startswith("Failed to restore"):
            reason = record.exc_info[1] if record.exc_info else "unknown"
            raise RunError(f"Tune cannot go on with this search: {reason}; give another out=..., or restore the folder's trials/experiment_state-*.json")
        return not record.getMessage().startswith(("Trial task failed", "Trials did not complete"))
    loggers = [logging.getLogger(f"ray.tune.{name}") for name in ("execution.tune_controller", "tune")]
    for logger in loggers:
        logger.addFilter(keep)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(keep)


class KeptRungs(Callback):
    """Keeps what ASHA knows in the experiment's state, which Tune restores callbacks from but not schedulers.

    Without it the rungs of a resumed search would be empty, and trials would go on that had to be stopped.
    """

    def __init__(self, scheduler: ASHAScheduler):
        self.scheduler = scheduler                                                  # the one of the same Tuner: both are restored from one pickle

    def get_state(self) -> dict[str, bytes]:
        with tempfile.NamedTemporaryFile() as file:
            self.scheduler.save(file.name)
            return {"scheduler": Path(file.name).read_bytes()}

    def set_state(self, state: dict[str, bytes]) -> None:
        with tempfile.NamedTemporaryFile() as file:
            Path(file.name).write_bytes(state["scheduler"])
            self.scheduler.restore(file.name)


class KeptTuner(Callback):
    """A copy of Tune's description of the search, made when the first trial starts; see `restored` in run.py."""

    def __init__(self, folder: Path):
        self.folder = folder

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        kept = kept_tuner(self.folder)
        if not kept.is_file():
            write_whole(kept, (self.folder / TRIALS / TUNER).read_bytes())


def write_whole(path: Path, content: bytes) -> None:
    """A file that is the old or the new one at any moment."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def kept_tuner(folder: Path) -> Path:
    return folder / f".{TUNER}"
