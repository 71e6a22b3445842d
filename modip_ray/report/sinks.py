"""Where scalars go besides metrics.jsonl: TensorBoard event files and Weights & Biases."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Mapping
from pathlib import Path

WANDB_MODES = ("disabled", "offline", "online")
_SKIP = {"kind", "phase", "mode", "wall_s", "env_steps", "updates", "episodes"}


def row_phase(row: Mapping) -> str:
    """'pretrain' (counted in updates) or 'online' (counted in environment steps)."""
    return "pretrain" if row.get("phase") == "pretrain" else "online"


def row_step(row: Mapping) -> int:
    """Environment steps for online rows, updates for rows of the pre-training."""
    return int(row.get("updates" if row_phase(row) == "pretrain" else "env_steps") or 0)


def scalars(row: Mapping) -> dict[str, float]:
    """Finite numbers of a row by tag: 'loss/value' (train), 'eval/mpc/mean', 'diagnostics/value_corr'; other kinds of row have none."""
    kind = row.get("kind")
    prefix = {"train": "", "eval": f"eval/{row.get('mode')}/", "diagnostics": "diagnostics/"}.get(kind)
    if prefix is None:
        return {}
    values = {k: v for k, v in row.items() if k not in _SKIP}
    if kind == "eval" and isinstance(row.get("ci95"), list | tuple):
        values["ci95_low"], values["ci95_high"] = row["ci95"]
    return {prefix + k: float(v) for k, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)}


class TensorBoardSink:
    """Event files under `folder`/pretrain (step = updates) and `folder`/online (step = environment steps); needs no torch and no TensorFlow."""

    def __init__(self, folder: Path, resumed_at: Mapping | None = None):
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError as error:
            why = f"tensorboard=True needs the package tensorboard: {error}. Install it (pip install tensorboard) or switch tensorboard off"
            raise RuntimeError(why) from error
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
    """One wandb run per run folder: its id is kept in `run_dir`/wandb_id, so that the same command continues the same run."""

    def __init__(self, run_dir: Path, mode: str, project: str, config: Mapping | None = None):
        try:
            import wandb
        except ImportError as error:
            raise RuntimeError(f"wandb_mode={mode!r} needs the package wandb: {error}. Install it (pip install wandb) or set wandb_mode=disabled") from error
        id_file = run_dir / "wandb_id"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:12] + "\n")
        identity = {"id": id_file.read_text().strip(), "resume": "allow", "reinit": "create_new"}
        self._run = wandb.init(project=project, name=run_dir.name, dir=str(run_dir), mode=mode, config=dict(config or {}), **identity)
        for phase, axis in (("pretrain", "updates"), ("online", "env_steps")):
            self._run.define_metric(f"{phase}/{axis}")
            self._run.define_metric(f"{phase}/*", step_metric=f"{phase}/{axis}")

    def write(self, row: Mapping) -> None:
        values = scalars(row)
        if not values:
            return
        phase = row_phase(row)
        axis = "updates" if phase == "pretrain" else "env_steps"
        self._run.log({f"{phase}/{axis}": row_step(row), **{f"{phase}/{tag}": value for tag, value in values.items()}})

    def flush(self) -> None:
        """wandb sends by itself."""

    def close(self) -> None:
        self._run.finish()
