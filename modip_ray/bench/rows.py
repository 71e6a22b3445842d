"""What every measurement of `modip bench` shares: rows, timing by turns, an agent and a replay of the configured sizes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from modip_ray.config import Config
from modip_ray.learning.replay import MixedReplay, ReplayBuffer, Segment
from modip_ray.model.agent import Agent

OBS_DIM, ACTION_DIM = 17, 6                         # HalfCheetah's and Walker2d's
CALLS_AT_LEAST = 3


@dataclass(frozen=True)
class Row:
    """A measurement, and a reference in the same unit. ratio: value / reference."""

    name: str
    value: float
    unit: str
    reference: float | None = None
    ratio: float | None = None
    against: str = ""                               # what the reference is


def compared(name: str, value: float, unit: str, reference: float, against: str) -> Row:
    return Row(name, value, unit, reference, value / reference, against)


@dataclass(frozen=True)
class Setting:
    """What every measurement gets: the settings, the seconds it may take for each function that it times, and the clock for that."""

    cfg: Config
    seconds: float
    clock: Callable[[], float] = time.perf_counter

    def medians(self, *functions: Callable[[], object]) -> list[float]:
        """Median seconds of a call of each. Calls take turns, so that a busy machine slows all of them alike."""
        for function in functions:                  # the first call pays for allocations and caches
            function()
        times: list[list[float]] = [[] for _ in functions]
        end = time.perf_counter() + self.seconds * len(functions)
        while time.perf_counter() < end or len(times[0]) < CALLS_AT_LEAST:
            for function, measured in zip(functions, times, strict=True):
                start = self.clock()
                function()
                measured.append(self.clock() - start)
        return [statistics.median(t) for t in times]

    @cached_property
    def agent(self) -> Agent:
        torch.manual_seed(self.cfg.seed)
        return Agent(self.cfg, OBS_DIM, ACTION_DIM)

    @cached_property
    def replay(self) -> MixedReplay:
        """Synthetic episodes: as many offline transitions as a run collects, a tenth of that online, with plans."""
        cfg, rng = self.cfg, np.random.default_rng(0)
        length = min(cfg.task.max_episode_steps, cfg.data.transitions)
        episodes = max(cfg.data.transitions // length, 1)
        offline = ReplayBuffer(episodes * length, OBS_DIM, ACTION_DIM, cfg.critic.gamma)
        online = ReplayBuffer(max(episodes // 10, 1) * length, OBS_DIM, ACTION_DIM, cfg.critic.gamma, cfg.planner.horizon)
        for i in range(episodes + max(episodes // 10, 1)):
            plans = rng.uniform(-1, 1, (length, cfg.planner.horizon, ACTION_DIM)).astype(np.float32) if i >= episodes else None
            gains = np.ones(length, np.float32) if i >= episodes else None
            (offline if i < episodes else online).add(Segment(
                rng.standard_normal((length + 1, OBS_DIM), dtype=np.float32), rng.uniform(-1, 1, (length, ACTION_DIM)).astype(np.float32),
                rng.standard_normal(length, dtype=np.float32), i % 2 == 0, plans, gains))
        return MixedReplay(offline, online, 0, cfg.distill.target == "planned")

    def model_batch(self) -> dict[str, np.ndarray]:
        w = self.cfg.world_model
        return self.replay.sequences(w.batch_size, w.horizon, self.cfg.critic.n_step, 0.5)

    def policy_batch(self) -> dict[str, np.ndarray]:
        p = self.cfg.policy
        return self.replay.chunks(p.batch_size, p.horizon, self.cfg.critic.n_step, 0.5)
