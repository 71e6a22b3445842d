"""What the driver asks of a running system, whether its roles live in one process (`serial.py`) or on Ray (actors/system.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypedDict

import numpy as np

from modip_ray.config import Config
from modip_ray.learning.build import Spec
from modip_ray.learning.checkpoint import Checkpoint
from modip_ray.learning.collector import SegmentHook
from modip_ray.learning.evaluation import Job, Outcome
from modip_ray.tasks.envs import EnvFactory
from modip_ray.tasks.episode import Episode

Phase = Literal["pretrain", "online"]
Snapshot = dict[str, Any]


def means(rows: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Of each number over the rows that have it; of a count (guard/) the last one."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for key, value in row.items():
            found.setdefault(key, []).append(value)
    return {key: values[-1] if key.startswith("guard/") else sum(values) / len(values) for key, values in found.items()}


@dataclass(frozen=True)
class Setup:
    """All that a system is built from. `checkpoint`: where to go on from; `plan_server`: what the planner actors build in place of the real planner;
    `folder`: the run's, where components write their checkpoint parts;
    `episodes`: the offline data, or the files of rows made of them (offline_rows.py), one for each replay shard."""

    cfg: Config
    spec: Spec
    episodes: Sequence[Episode | Path]
    env_factory: EnvFactory
    hook: SegmentHook | None = None
    checkpoint: Checkpoint | None = None
    plan_server: Callable[..., Any] | None = None
    folder: Path | None = None


@dataclass(frozen=True)
class Status:
    """Counters, and what happened since the last status: means of metrics, returns of finished training episodes, incidents in words."""

    env_steps: int
    updates: int
    policy_updates: int
    done: bool
    metrics: dict[str, float] = field(default_factory=dict)
    returns: list[float] = field(default_factory=list)
    incidents: list[str] = field(default_factory=list)


class Counts(TypedDict):
    env_steps: int
    updates: int
    policy_updates: int


@dataclass(frozen=True)
class Report:
    """A finished evaluation: of which counters, the outcomes, the diagnostics taken with the same weights, and, of the last one, what happened meanwhile."""

    env_steps: int
    updates: int
    outcomes: list[Outcome]
    diagnostics: dict[str, Any]
    incidents: list[str] = field(default_factory=list)


class System(Protocol):
    def advance(self, phase: Phase, seconds: float, until: int) -> Status:
        """Work on a phase for about so many seconds, or until it is done, or until `until` environment steps are stored."""

    def freeze_bc(self) -> None:
        """Keep the policy's weights of now as the BC baseline."""

    def save(self, folder: Path) -> Counts:
        """Write every component's checkpoint part; the counters of what was written.

        No part holds updates made on data that the replay's part lacks: the learners write first.
        """

    def request_evaluation(self, jobs: Sequence[Job]) -> bool:
        """Evaluate the weights of now beside the training, if the last request is finished; False when it is not."""

    def reports(self) -> list[Report]:
        """Evaluations finished since the last call."""

    def evaluate(self, jobs: Sequence[Job], progress: Callable[[Outcome], None]) -> Report:
        """Stop all training and evaluate the final weights; `progress` gets each outcome as it comes."""

    def timings(self) -> dict[str, tuple[Snapshot, int]]:
        """Time by role, and how many processes have that role."""

    def gauges(self) -> dict[str, float]:
        """Numbers of now, by name: "rollout/workers", "planner/rows_per_batch", "replay/ahead", ..."""

    def close(self) -> None:
        """Give everything back; safe to call twice."""


def saved_bc(checkpoint: Checkpoint | None) -> np.ndarray | None:
    return checkpoint.read("bc")["policy"] if checkpoint is not None and checkpoint.has("bc") else None
