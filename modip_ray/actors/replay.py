"""The replay role: segments in, batches out, and whoever is ahead waits."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ray

from modip_ray.actors.placement import sees
from modip_ray.config import Config
from modip_ray.learning.checkpoint import Checkpoint, write_state
from modip_ray.learning.limiter import COLLECTION_WAITS, LEARNING_WAITS, STREAMS, Stream
from modip_ray.learning.replay import Batch, Segment
from modip_ray.learning.replay_server import build_replay, shard_config, shard_name
from modip_ray.tasks.episode import Episode
from modip_ray.timing import Timer

HOLD_S = 0.5                        # a call waits no longer than this for its turn; then it is answered "not yet"


def shard_updates(state: Mapping[str, np.ndarray], shards: int) -> np.ndarray:
    """How many of a learner's updates, by its checkpoint part, took their batch from each shard (n,)."""
    return state["shard_updates"] if shards > 1 else state["updates"].reshape(1)


class Ack(NamedTuple):
    env_steps: int
    may_collect: bool


@ray.remote(num_cpus=0, max_restarts=0)
class ReplayActor:
    """One of replay.shards, with its own part of the offline episodes."""

    def __init__(self, cfg: Config, episodes: list[Episode], checkpoint: Checkpoint | None, shard: int = 0):
        self.timer, self.component = Timer(), shard_name(cfg, shard)
        self.server = build_replay(shard_config(cfg, shard), episodes)
        self.limiter = self.server.limiter
        if checkpoint is not None:
            counts = [int(shard_updates(checkpoint.read(f"learner_{s}"), cfg.replay.shards)[shard]) for s in STREAMS]
            self.server.load_state(checkpoint.read(self.component), *counts)
        self.changed = asyncio.Condition()

    async def sees(self, folder: str, token: str) -> bool:
        return sees(folder, token)

    async def add(self, segments: list[Segment]) -> Ack:
        """Store, then hold the answer while collection is too far ahead."""
        with self.timer("add"):
            self.server.add(segments)
        await self.notify()
        return await self.turn()

    async def turn(self) -> Ack:
        """Answered when collection may go on; or after HOLD_S, with may_collect False."""
        await self.hold(self.limiter.may_collect, COLLECTION_WAITS)
        return Ack(self.server.env_steps, self.limiter.may_collect())

    async def sample(self, stream: Stream) -> tuple[int, Batch] | None:
        """The stream's next batch, with the number of the update it is for: Ray may run an async actor's calls in any order.

        None when learning had to wait for collection longer than HOLD_S.
        """
        await self.hold(lambda: self.limiter.may_sample(stream), LEARNING_WAITS)
        if not self.limiter.may_sample(stream):
            return None
        with self.timer("sample"):
            number, batch = self.limiter.granted[stream], self.server.sample(stream)
        await self.notify()
        return number, batch

    async def hold(self, ready: Any, reason: str) -> None:
        if ready():
            return
        deadline = time.monotonic() + HOLD_S
        with self.timer(reason):
            async with self.changed:
                while not ready() and (left := deadline - time.monotonic()) > 0:
                    try:
                        await asyncio.wait_for(self.changed.wait(), left)
                    except TimeoutError:
                        return

    async def notify(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    async def diagnostic_batch(self, rows: int, horizon: int, seed: int) -> tuple[Batch, dict[str, float]]:
        return self.server.diagnostic_batch(rows, horizon, seed), self.server.plan_statistics()

    async def status(self) -> dict[str, Any]:
        return {"env_steps": self.server.env_steps, "allowed": {s: self.limiter.allowed(s) for s in STREAMS}, "ahead": self.limiter.ahead(),
                "transitions": self.server.replay.online.size, "segments": len(self.server.replay.seen), "timing": self.timer.snapshot()}

    async def save(self, folder: str) -> None:
        """The arrays are copied at once, so the checkpoint is of one moment; writing happens beside the loop."""
        state = {k: v.copy() for k, v in self.server.state().items()}
        await asyncio.to_thread(write_state, Path(folder), self.component, state)
