"""The rollout role: a group of environments in a process without torch, driven by the planner, feeding the replay."""

from __future__ import annotations

import time
import uuid
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import ray
from ray.exceptions import RayActorError

from modip_ray.config import Config
from modip_ray.learning.collector import Collector, Planned, SegmentHook
from modip_ray.tasks.envs import EnvFactory
from modip_ray.timing import Timer

MAX_UNACKNOWLEDGED = 2


class RolloutReport(NamedTuple):
    worker: int
    incarnation: str
    steps: int                      # executed in this call
    total: int                      # executed by this incarnation
    returns: list[float]            # of episodes that ended
    timing: dict[str, Any]


@ray.remote(max_restarts=-1, max_task_retries=0)
class RolloutWorker:
    """Holds nothing that matters: after a crash Ray runs the constructor again, with a new incarnation id and new episodes.

    `apply` and `ping` are what RLlib's FaultTolerantActorManager asks of an actor (its own base class would import torch here).
    """

    def __init__(self, cfg: Config, env_factory: EnvFactory, hook: SegmentHook | None, worker: int, planner: str, replay: str):
        self.cfg, self.worker, self.timer = cfg, worker, Timer()
        self.planner, self.replay = ray.get_actor(planner), ray.get_actor(replay)
        self.incarnation = uuid.uuid4().hex[:8]
        seed = (cfg.seed, worker + 1, int(self.incarnation, 16))
        self.collector = Collector(env_factory, cfg.rollout.envs_per_worker, cfg.task.max_episode_steps, cfg.rollout.segment_length, seed,
                                   f"{worker}/{self.incarnation}", hook)
        self.acks: deque[ray.ObjectRef] = deque()
        self.total, self.waited = 0, 0.0

    def apply(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return func(self, *args, **kwargs)

    def ping(self) -> str:
        return "pong"

    def modules(self) -> list[str]:
        """Names of the imported top-level packages (a test looks for torch)."""
        import sys
        return sorted({name.partition(".")[0] for name in sys.modules})

    def run(self, steps: int, seconds: float) -> RolloutReport:
        """Collect so many environment steps (to the end of a group step), or for so many seconds."""
        deadline, before = time.monotonic() + seconds, self.total
        while self.total - before < steps and time.monotonic() < deadline:
            if not self.acknowledged(MAX_UNACKNOWLEDGED - 1, deadline):
                break
            begun, self.waited = time.perf_counter(), 0.0
            self.total += self.collector.step(self.plan)
            self.timer.add("environments", time.perf_counter() - begun - self.waited)
            self.send(self.collector.take_segments())
        return self.report(self.total - before)

    def flush(self) -> RolloutReport:
        """Send the open segments too, and wait until everything is stored."""
        self.send(self.collector.take_segments(flush=True))
        while self.acks:
            self.get(self.acks.popleft())
        return self.report(0)

    def send(self, segments: list) -> None:
        if segments:
            self.acks.append(self.replay.add.remote(segments))

    def acknowledged(self, unanswered: int, deadline: float) -> bool:
        """Wait until at most `unanswered` sendings are; and, where the replay says so, for collection's turn. False when time is over."""
        begun = time.perf_counter()
        while len(self.acks) > unanswered:
            ack = self.get(self.acks.popleft())
            if not ack.may_collect:
                self.acks.append(self.replay.turn.remote())
                if time.monotonic() >= deadline:
                    break
        self.timer.add("wait/learning", time.perf_counter() - begun)
        return len(self.acks) <= unanswered

    def plan(self, obs: np.ndarray, reset: np.ndarray) -> Planned:
        """Ask the planner; while Ray restarts a planner that died, ask again."""
        begun, deadline = time.perf_counter(), time.monotonic() + self.cfg.resources.call_timeout_s
        while True:
            try:
                planned = self.get(self.planner.plan.remote(self.worker, self.incarnation, obs, reset))
                break
            except RayActorError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)
        self.waited = time.perf_counter() - begun
        self.timer.add("wait/planner", self.waited)
        return planned

    def report(self, steps: int) -> RolloutReport:
        returns = [episode.ret for episode in self.collector.take_episodes()]
        return RolloutReport(self.worker, self.incarnation, steps, self.total, returns, self.timer.snapshot())

    def get(self, ref: ray.ObjectRef) -> Any:
        return ray.get(ref, timeout=self.cfg.resources.call_timeout_s)
