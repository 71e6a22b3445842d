"""A learner's batches, fetched ahead from all replay shards."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import ray

from modip_ray.learning.limiter import Stream
from modip_ray.learning.replay import Batch
from modip_ray.timing import Timer


class Shard:
    """Requests to one replay actor that are on their way, for the updates used, used + 1, ... One that was lost is simply made again."""

    def __init__(self, replay: Any, stream: Stream, used: int):
        self.replay, self.stream, self.used = replay, stream, used
        self.asked: deque[ray.ObjectRef] = deque()

    def ask(self, prefetch: int) -> None:
        while len(self.asked) < prefetch:
            self.asked.append(self.replay.sample.remote(self.stream, self.used + len(self.asked)))


class BatchSource:
    """The shards take turns; one that has nothing to give yet is passed over. used: batches taken from each so far (n,)."""

    def __init__(self, replays: Sequence[Any], stream: Stream, used: Sequence[int], prefetch: int, timeout_s: float, timer: Timer):
        self.shards = [Shard(replay, stream, int(n)) for replay, n in zip(replays, used, strict=True)]
        self.prefetch, self.timeout_s, self.timer, self.turn = prefetch, timeout_s, timer, 0

    @property
    def used(self) -> list[int]:
        return [shard.used for shard in self.shards]

    def next(self) -> Batch | None:
        """The batch of the next update, a copy of our own; None while collection is behind."""
        for shard in self.in_order():
            batch = self.take(shard)
            if batch is not None:
                self.turn = (self.shards.index(shard) + 1) % len(self.shards)
                return batch
        return None

    def in_order(self) -> list[Shard]:
        """By turns, those first whose answer is there."""
        for shard in self.shards:
            shard.ask(self.prefetch)
        order = self.shards[self.turn:] + self.shards[:self.turn]
        if len(order) == 1:
            return order
        refs = [shard.asked[0] for shard in order]
        with self.timer("wait/replay"):
            ray.wait(refs, num_returns=1, timeout=self.timeout_s)
        there = set(ray.wait(refs, num_returns=len(refs), timeout=0)[0])
        return sorted(order, key=lambda shard: shard.asked[0] not in there)

    def take(self, shard: Shard) -> Batch | None:
        shard.ask(self.prefetch)
        with self.timer("wait/replay") as span:
            found = ray.get(shard.asked[0], timeout=self.timeout_s)
            span.name = "wait/collection" if found is None else span.name
        if found is None:
            shard.asked.clear()                                                     # those behind it have to wait as well
            return None
        shard.asked.popleft()
        shard.used += 1
        return {k: np.array(v) for k, v in found.items()}
