"""Where scalars go besides metrics.jsonl: TensorBoard event files and Weights & Biases. (Ray's metrics: actors/metrics.py.)"""

from __future__ import annotations

import math
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Protocol

WANDB_MODES = ("disabled", "offline", "online")
REACH_S = 5.0  # a wandb server that does not answer for so long is taken for absent
FINISH_S = 60.0  # wandb may go on sending for so long after the end
_SKIP = {"kind", "phase", "mode", "wall_s", "env_steps", "updates", "policy_updates", "episodes"}
_PREFIX = {"train": "", "system": "system/", "diagnostics": "diagnostics/"}


class SinkError(RuntimeError):
    """A sink that cannot be used (any more); the run goes on without it. The message says why and what to do."""


class Sink(Protocol):
    """Follows metrics.jsonl row by row. Any method may raise SinkError, after which the sink is left out."""

    def write(self, row: Mapping) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


def row_phase(row: Mapping) -> str:
    """'pretrain' (counted in updates) or 'online' (counted in environment steps)."""
    return "pretrain" if row.get("phase") == "pretrain" else "online"


def row_step(row: Mapping) -> int:
    """Environment steps for online rows; for rows of the pre-training the updates of all networks: those of one may be over while the other's go on."""
    keys = ("updates", "policy_updates") if row_phase(row) == "pretrain" else ("env_steps",)
    return sum(int(row.get(key) or 0) for key in keys)


def scalars(row: Mapping) -> dict[str, float]:
    """Finite numbers of a row by tag: 'loss/value', 'eval/mpc/mean', 'system/rollout/workers', 'diagnostics/value_corr'; other kinds of row have none."""
    kind = row.get("kind")
    prefix = f"eval/{row.get('mode')}/" if kind == "eval" else _PREFIX.get(str(kind))
    if prefix is None:
        return {}
    values = {k: v for k, v in row.items() if k not in _SKIP}
    if kind == "eval" and isinstance(row.get("ci95"), list | tuple):
        values["ci95_low"], values["ci95_high"] = row["ci95"]
    return {prefix + k: float(v) for k, v in values.items() if is_number(v)}


def is_number(value: object) -> bool:
    """A finite number (a flag is none)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


class TensorBoardSink:
    """Event files under `folder`/pretrain (step = updates of all networks) and `folder`/online (step = environment steps); needs no torch and no TensorFlow."""

    def __init__(self, folder: Path, resumed_at: Mapping | None = None):
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError as error:
            raise SinkError(f"no TensorBoard: {error}; pip install tensorboard, or set log.tensorboard=false") from error
        self._event, self._summary, self._writer_class = event_pb2.Event, summary_pb2.Summary, EventFileWriter
        self._session = event_pb2.SessionLog
        self._folder = folder
        self._writers: dict = {}
        self._resumed_at = dict(resumed_at or {})
        if resumed_at is not None:
            self._writer(row_phase(resumed_at))

    def _writer(self, phase: str):
        if phase not in self._writers:
            writer = self._writers[phase] = self._writer_class(str(self._folder / phase))
            if self._resumed_at and phase == row_phase(self._resumed_at):  # hides what a killed process wrote after its last checkpoint
                step = row_step(self._resumed_at) + 1
                writer.add_event(self._event(wall_time=time.time(), step=step, file_version="brain.Event:2"))
                writer.add_event(self._event(wall_time=time.time(), step=step, session_log=self._session(status=self._session.START)))
        return self._writers[phase]

    def write(self, row: Mapping) -> None:
        values = scalars(row)
        if not values:
            return
        summary = self._summary(value=[self._summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
        self._writer(row_phase(row)).add_event(self._event(wall_time=time.time(), step=row_step(row), summary=summary))

    def flush(self) -> None:
        for writer in self._writers.values():
            writer.flush()

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()
        self._writers = {}


class WandbSink:
    """One wandb run per run folder: its id is kept in `run_dir`/wandb_id, so that the same command continues the same run.

    Online without a reachable server or an API key, the run is written offline, `say` gets one line why, and `wandb sync` sends it later.
    wandb itself repeats what it cannot send in the course of a run. What it would read off the process stays out: no console, no code, no git patch.
    """

    def __init__(self, run_dir: Path, mode: str, project: str, config: Mapping | None, say: Callable[[str], None]):
        try:
            import wandb
        except ImportError as error:
            raise SinkError(f"no Weights & Biases: {error}; pip install 'modip_ray[wandb]', or set log.wandb=disabled") from error
        self._trouble = (wandb.Error, OSError)  # its service process gone, among others
        id_file = run_dir / "wandb_id"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:12] + "\n")
        if mode == "online" and (why := _unreachable(wandb.setup().settings.base_url)):
            mode = _offline(why, run_dir, say)
        settings = wandb.Settings(console="off", save_code=False, finish_timeout=FINISH_S)
        identity = {"id": id_file.read_text().strip(), "resume": "allow", "reinit": "create_new", "settings": settings}
        start = partial(wandb.init, project=project, name=run_dir.name, dir=str(run_dir), config=dict(config or {}), **identity)
        try:
            try:
                self._run = start(mode=mode)
            except wandb.errors.UsageError as error:  # no API key
                if mode == "offline":
                    raise
                self._run = start(mode=_offline(_first_line(error), run_dir, say))
        except self._trouble as error:
            raise SinkError(f"no Weights & Biases: {_first_line(error)}; log.wandb=offline needs no network") from error
        for phase, axis in (("pretrain", "updates"), ("online", "env_steps")):
            self._run.define_metric(f"{phase}/{axis}")
            self._run.define_metric(f"{phase}/*", step_metric=f"{phase}/{axis}")

    def write(self, row: Mapping) -> None:
        values = scalars(row)
        if not values:
            return
        phase = row_phase(row)
        axis = "updates" if phase == "pretrain" else "env_steps"
        try:
            self._run.log({f"{phase}/{axis}": row_step(row), **{f"{phase}/{tag}": value for tag, value in values.items()}})
        except self._trouble as error:
            raise SinkError(f"Weights & Biases stopped: {_first_line(error)}; metrics.jsonl goes on") from error

    def flush(self) -> None:
        """wandb sends by itself."""

    def close(self) -> None:
        try:
            self._run.finish()
        except self._trouble as error:
            raise SinkError(f"Weights & Biases: the end was not sent: {_first_line(error)}") from error


def _unreachable(url: str) -> str:
    """Why a server does not answer; '' for one that does, whatever it says. wandb.init would try for 100 s and then fail."""
    try:
        urllib.request.urlopen(url, timeout=REACH_S).close()
    except urllib.error.HTTPError:
        return ""
    except OSError as error:
        return f"{url} does not answer ({getattr(error, 'reason', error)})"
    return ""


def _offline(why: str, run_dir: Path, say: Callable[[str], None]) -> str:
    say(f"Weights & Biases offline: {why}; 'wandb sync {run_dir}/wandb/offline-run-*' sends the run later")
    return "offline"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
