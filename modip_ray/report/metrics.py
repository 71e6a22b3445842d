"""metrics.jsonl: one JSON object a line, appended and flushed row by row, and the sinks that follow it.

Kinds of row: data, phase (one begins), train (means since the last row), system (numbers of now, names.py has them all), eval, diagnostics, timing,
incident (what happened, in words), and resume, which this file writes itself: {"kind": "resume", "phase", "env_steps", "updates"} says that a killed
run went on from a checkpoint there, so rows before it with larger counters were lost and measured anew (`live_rows` drops them). Rows without
counters (timing, incident) stay: that time was spent and those incidents did happen.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from modip_ray.report.sinks import WANDB_MODES, Sink, SinkError, TensorBoardSink, WandbSink

FILE_NAME = "metrics.jsonl"
COUNTS = ("env_steps", "updates", "policy_updates")

_log = logging.getLogger(__name__)


def on_stderr(text: str) -> None:
    print(f"modip: {text}", file=sys.stderr, flush=True)


class MetricsLog:
    """Appends rows to `run_dir`/metrics.jsonl and forwards them to the sinks: TensorBoard, wandb, and what `add` brings.

    run_dir: folder of the run, made if absent; TensorBoard's files go to `run_dir`/tensorboard.
    wandb_mode: 'disabled', 'offline' (no network) or 'online'; config: dict shown by wandb.
    resumed_at: {"phase", "env_steps", "updates", "policy_updates"} of the checkpoint that the run goes on from, None for a fresh start.
    say: gets one line about a sink that cannot be used (its package is missing, say), which is then left out; training does not stop for it.
    written: rows by kind, in the whole file. Raises ValueError for an unknown wandb_mode or a row without 'kind'.
    """

    def __init__(
        self,
        run_dir: str | Path,
        tensorboard: bool = True,
        wandb_mode: str = "disabled",
        project: str = "modip-ray",
        config: Mapping | None = None,
        resumed_at: Mapping | None = None,
        say: Callable[[str], None] = on_stderr,
    ):
        if wandb_mode not in WANDB_MODES:
            raise ValueError(f"wandb_mode: got {wandb_mode!r}, expected one of {', '.join(WANDB_MODES)}")
        self.run_dir = Path(run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        path = self.run_dir / FILE_NAME
        _cut_torn_line(path)
        earlier = read_metrics(self.run_dir) if path.exists() else []
        self._wall_before = max((float(row["wall_s"]) for row in earlier if row.get("wall_s") is not None), default=0.0)
        self.written = Counter(str(row.get("kind")) for row in earlier)
        self._opened = time.monotonic()
        self._file = path.open("a", encoding="utf-8")
        self._say = say
        self._sinks: list[Sink] = []
        if tensorboard:
            self.add(lambda: TensorBoardSink(self.run_dir / "tensorboard", resumed_at))
        if wandb_mode != "disabled":
            self.add(lambda: WandbSink(self.run_dir, wandb_mode, project, config, say))
        if resumed_at is not None:
            self.write({"kind": "resume", **resumed_at})

    @property
    def wall_s(self) -> float:
        """Seconds this run has been worked on, earlier processes of the same folder included."""
        return self._wall_before + time.monotonic() - self._opened

    def add(self, make: Callable[[], Sink]) -> None:
        """One more sink for the rows to come, if it can be made."""
        try:
            self._sinks.append(make())
        except SinkError as error:
            self._say(str(error))

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row; `wall_s` is filled in where absent; numpy values become lists and numbers, NaN and infinities null."""
        if not isinstance(row.get("kind"), str):
            raise ValueError(f"metrics row: got no 'kind' among the keys {sorted(row)}, expected one, e.g. kind=train")
        plain = {key: to_plain(value, key) for key, value in row.items()}
        plain.setdefault("wall_s", round(self.wall_s, 3))
        self._file.write(json.dumps(plain, allow_nan=False) + "\n")
        self._file.flush()
        self.written[plain["kind"]] += 1
        self._each(lambda sink: sink.write(plain))

    def flush(self) -> None:
        """Push TensorBoard's buffered events to disk (metrics.jsonl is flushed at every row)."""
        self._each(lambda sink: sink.flush())

    def close(self) -> None:
        """Close the file and the sinks; safe to call twice."""
        self._each(lambda sink: sink.close())
        self._sinks = []
        self._file.close()

    def _each(self, do: Callable[[Sink], None]) -> None:
        for sink in list(self._sinks):
            try:
                do(sink)
            except SinkError as error:
                self._sinks.remove(sink)
                self._say(str(error))

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def read_metrics(run_dir: str | Path) -> list[dict]:
    """All rows of `run_dir`/metrics.jsonl; a torn last line (no newline, not JSON) is left out, any other broken line raises ValueError."""
    path = Path(run_dir) / FILE_NAME
    if not path.exists():
        raise FileNotFoundError(f"no {FILE_NAME} in {run_dir}: expected a run folder as written by 'modip train run_dir=...'")
    rows = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            row = _parse(line)
            if row is None and not line.endswith(b"\n"):
                break
            if row is None:
                raise ValueError(f"{path}, line {number}: got {line[:80]!r}, expected one JSON object; mend or delete that line")
            rows.append(row)
    return rows


def live_rows(rows: list[dict]) -> list[dict]:
    """Rows without those that a resume made void: a row before it of which a count lies beyond the checkpoint's. Resume rows stay: a process begins there."""
    kept: list[dict] = []
    for row in rows:
        if row.get("kind") == "resume":
            kept = [old for old in kept if old.get("kind") == "resume" or _before(old, row)]
        kept.append(row)
    return kept


def by_process(rows: Sequence[Mapping]) -> list[list[Mapping]]:
    """Rows of each process that worked on the run, its resume row first."""
    processes: list[list[Mapping]] = [[]]
    for row in rows:
        if row.get("kind") == "resume":
            processes.append([])
        processes[-1].append(row)
    return processes


def to_plain(value: Any, key: str = "value") -> Any:
    """Value as JSON knows it; raises TypeError naming `key` for what has no JSON form."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Mapping):
        return {str(k): to_plain(v, f"{key}.{k}") for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(v, key) for v in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # numpy scalars and arrays, torch tensors
        return to_plain(value.tolist(), key)
    raise TypeError(f"metrics row, {key!r}: got {type(value).__name__}, expected numbers, text, lists, dicts or numpy arrays")


def _before(row: Mapping, resume: Mapping) -> bool:
    """The row was written before what the run goes on from: as far in all counts that both say. Later steps, or later updates of either network, are void."""
    return all(row[key] <= resume[key] for key in COUNTS if row.get(key) is not None and resume.get(key) is not None)


def _parse(line: bytes) -> dict | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _cut_torn_line(path: Path) -> None:
    """Mend the end of a file whose writer was killed: finish a whole last row with its newline, cut half a row off and say so."""
    if not path.exists():
        return
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    if end == len(data):
        return
    tail = data[end:]
    with path.open("r+b") as file:
        if _parse(tail) is not None:
            file.seek(0, os.SEEK_END)
            file.write(b"\n")
        else:
            file.truncate(end)
            _log.warning("%s: cut off a torn last line of %d bytes (the run was stopped while writing it)", path, len(tail))
