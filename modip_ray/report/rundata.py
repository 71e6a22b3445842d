"""A run folder as the report reads it; works for a run that is still going or was stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modip_ray.report.metrics import live_rows, read_metrics
from modip_ray.report.scores import method_of, run_title, scores_from_rows
from modip_ray.timing import Snapshot, merge_snapshots


@dataclass(frozen=True)
class RoleTime:
    """Where one role's time went: summed over resumes; `total` is the role's wall seconds times its number of workers, which is the newest process's."""

    role: str
    snapshot: Snapshot
    total: float
    workers: int


@dataclass(frozen=True)
class RunData:
    """All that the page shows of one run; `summary` is empty while the run is unfinished, `config` is flat (dotted names)."""

    path: Path
    rows: list[dict]        # less those that a resume made void
    written: list[dict]     # all of them
    summary: dict
    config: dict[str, Any]
    page_dir: Path  # folder of the page, which links are relative to

    @property
    def finished(self) -> bool:
        return bool(self.summary)

    @property
    def resumes(self) -> list[dict]:
        return self.of_kind("resume")

    @property
    def task(self) -> str:
        return str(self.summary.get("task") or self._setting("task", "task.name") or "")

    @property
    def env_id(self) -> str:
        return str(self.summary.get("env_id") or self._setting("env_id", "task.env_id", "env.id") or "")

    @property
    def title(self) -> str:
        return run_title(self.task, self.env_id) or self.path.name

    @property
    def method(self) -> str:
        return method_of(self.config)

    @property
    def scores(self) -> dict[str, dict]:
        """The summary's scores; for modes it lacks, the latest ones in the metrics."""
        return {**scores_from_rows(self.rows), **(self.summary.get("scores") or {})}

    @property
    def video(self) -> Path | None:
        path = self.path / "report" / "video.mp4"
        return path if path.exists() else None

    def latest(self, key: str) -> Any:
        """The last value of `key` in any row, None where there is none."""
        return next((row[key] for row in reversed(self.rows) if row.get(key) is not None), None)

    def of_kind(self, kind: str) -> list[dict]:
        return [row for row in self.rows if row.get("kind") == kind]

    def _setting(self, *names: str) -> Any:
        return next((self.config[name] for name in names if self.config.get(name)), None)


def load_run(run_dir: str | Path, page_dir: Path | None = None) -> RunData:
    """Read a run folder; the page is written to `page_dir` (default: its report/).

    Raises FileNotFoundError where it holds no metrics.jsonl and ValueError for a file that does not parse.
    """
    path = Path(run_dir).resolve()
    rows, config, summary = read_metrics(path), _read_config(path / "config.yaml"), _read_summary(path / "summary.json")
    if (summary.get("env_steps") or 0) < (config.get("online.env_steps") or 0):     # of a run that was prolonged since
        summary = {}
    return RunData(
        path=path,
        rows=live_rows(rows),
        written=rows,
        summary=summary,
        config=config,
        page_dir=page_dir or path / "report",
    )


def role_times(rows: Sequence[Mapping]) -> list[RoleTime]:
    """Timing rows (cumulative since their process started) by role. A row of kind resume, or a fall of the counts (of a role that was made anew), marks a new
    process, whose times are added."""
    segments: dict[str, list[Mapping]] = {}
    current: set[str] = set()                                                       # roles with a row since the last resume
    for row in rows:
        if row.get("kind") == "resume":
            current.clear()
        if row.get("kind") != "timing":
            continue
        mine = segments.setdefault(role := str(row.get("role")), [])
        if role in current and _blocks(row) >= _blocks(mine[-1]):
            mine[-1] = row
        else:
            mine.append(row)
        current.add(role)
    times = []
    for role, parts in segments.items():
        snapshot = merge_snapshots({"seconds": p.get("seconds") or {}, "counts": p.get("counts") or {}} for p in parts)
        workers = int(parts[-1].get("workers") or 1)
        timed = sum(seconds for name, seconds in snapshot["seconds"].items() if not _has_parent(name, snapshot["seconds"]))
        ends = [0.0, *(float(p.get("wall_s") or 0.0) for p in parts)]
        wall = sum(max(0.0, end - begun) * int(p.get("workers") or 1) for p, begun, end in zip(parts, ends, ends[1:], strict=False))
        times.append(RoleTime(role, snapshot, max(timed, wall), workers))
    return times


def flatten(tree: Mapping, prefix: str = "") -> dict[str, Any]:
    """{'a': {'b': 1}} -> {'a.b': 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _blocks(row: Mapping) -> int:
    return sum((row.get("counts") or {}).values())


def _has_parent(name: str, names: Mapping) -> bool:
    parts = name.split("/")
    return any("/".join(parts[:i]) in names for i in range(1, len(parts)))


def _read_summary(path: Path) -> dict:
    if not path.exists():
        return {}
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}; expected JSON as written at the end of a run; delete it to report from metrics.jsonl alone") from error
    if not isinstance(summary, dict):
        raise ValueError(f"{path}: got a JSON {type(summary).__name__}, expected an object; delete it to report from metrics.jsonl alone")
    return summary


def _read_config(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    import yaml

    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: {error}; expected the YAML that the run saved") from error
    return flatten(tree) if isinstance(tree, dict) else {}
