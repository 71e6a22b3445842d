"""The replay role: segments in, batches out, and whoever is ahead waits."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any, NamedTuple

import ray

from modip_ray.actors.placement import sees
from modip_ray.actors.pulse import ASYNC_PULSE, Life, Pulse
from modip_ray.config import Config
from modip_ray.learning.checkpoint import Checkpoint, newest
from modip_ray.learning.limiter import COLLECTION_WAITS, LEARNING_WAITS, STREAMS, Stream
from modip_ray.learning.replay import Batch
from modip_ray.learning.replay_server import restored_replay
from modip_ray.learning.segment import Segment
from modip_ray.tasks.episode import Episode
from modip_ray.timing import Timer

HOLD_S = 0.5                        # a call waits no longer than this for its turn; then it is answered "not yet"


class Ack(NamedTuple):
    env_steps: int
    may_collect: bool


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class ReplayActor:
    """One of replay.shards, with its own part of the offline episodes.

    Killed, it comes back by itself as it was: from the newest checkpoint of the run's folder and from its journal. Ray makes the
    calls again that were on their way, which does no harm: a segment that is stored is known by its id, a batch is asked for by the number of its update.
    """

    def __init__(self, cfg: Config, data: list[Episode | Path], checkpoint: Checkpoint | None, shard: int = 0, folder: Path | None = None):
        """folder: the run's; its newest checkpoint of now counts, not the one given; data: as of Setup.episodes, of this shard."""
        self.timer = Timer()
        if folder is not None:
            checkpoint = newest(folder / "checkpoints")
        self.server = restored_replay(cfg, data, checkpoint, folder, shard)
        self.limiter = self.server.limiter
        self.changed = asyncio.Condition()
        self.life = Life(self.timer, f"with {self.server.env_steps} environment steps")

    @ray.method(**ASYNC_PULSE)
    async def pulse(self) -> Pulse:
        return self.life.pulse()

    async def sees(self, folder: str, token: str) -> bool:
        return sees(folder, token)

    async def add(self, segments: list[Segment]) -> Ack:
        """Store, then hold the answer while collection is too far ahead.

        JournalError where the disk does not take them, Refused for a worker that was retired, ValueError for a segment that is not sound: nothing is stored.
        """
        with self.timer("add"):
            self.server.add(segments)
        await self.notify()
        return await self.turn()

    async def turn(self) -> Ack:
        """Answered when collection may go on; or after HOLD_S, with may_collect False."""
        await self.hold(self.limiter.may_collect, COLLECTION_WAITS)
        return Ack(self.server.env_steps, self.limiter.may_collect())

    async def sample(self, stream: Stream, update: int) -> Batch | None:
        """The stream's batch for an update (0, 1, ...), which says as well that those before are made; None when learning had to wait longer than HOLD_S."""
        self.limiter.note(stream, update)
        await self.notify()
        await self.hold(lambda: self.limiter.may_sample(stream, update), LEARNING_WAITS)
        if not self.limiter.may_sample(stream, update):
            return None
        with self.timer("sample"):
            batch = self.server.sample(stream, update)
        await self.notify()
        return batch

    async def retire(self, incarnation: str) -> None:
        """Refuse the segments of a worker incarnation that was given up, from now on and after restarts too: `add` raises Refused."""
        self.server.retire(incarnation)

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
                "transitions": self.server.replay.online.size, "segments": len(self.server.replay.seen),
                "incarnation": self.life.incarnation, "refused": self.server.refused, "damaged": self.server.damaged, "timing": self.timer.snapshot()}

    async def save(self, folder: str) -> int:
        """The checkpoint is of the one moment between two steps that read and write files beside the loop. Returns the environment steps in it."""
        sound = await asyncio.to_thread(self.server.files.sound, Path(folder).parent)
        return await asyncio.to_thread(self.server.write, Path(folder), self.server.snapshot(sound))
