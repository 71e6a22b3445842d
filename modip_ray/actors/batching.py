"""Gathers single requests into batches on an asyncio loop; the work itself runs in a thread, so the loop stays free. No Ray."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

ALIVE_S = 1.0


@dataclass
class Entry:
    client: Hashable
    item: Any
    rows: int
    future: asyncio.Future
    arrived: float


class BatchQueue:
    """A batch is closed when it has `max_rows` rows, when all live clients have asked, or `max_wait_s` after its first request or the last answer.

    `share`: of the live clients that must have asked, in place of all (a half where each works on something else meanwhile). The last answer
    counts too, because those who got it will ask again at once: else two clients would take turns for ever, each alone in a batch.

    compute : items -> one result or exception for each; called in a thread of its own, one batch at a time
    inline  : call it in the loop itself: on a CPU a thread would fight with a busy loop for the interpreter's lock (docs/serve.md)
    Live is who asked within the last second: a dead client delays others by `max_wait_s` at most, and for a second only.
    """

    def __init__(self, compute: Callable[[list[Any]], Sequence[Any]], max_rows: int, max_wait_s: float, share: float = 1.0,
                 initializer: Callable[[], None] | None = None, inline: bool = False):
        self.compute, self.max_rows, self.max_wait_s, self.share = compute, max_rows, max_wait_s, share
        self.pool = None if inline else ThreadPoolExecutor(1, "batch", initializer)
        self.waiting: list[Entry] = []
        self.seen: dict[Hashable, float] = {}
        self.arrived = asyncio.Event()
        self.server: asyncio.Task | None = None
        self.totals = np.zeros(4)                                                   # batches, rows, requests, seconds from asking to the answer
        self.free_at = float("-inf")                                                # when the last batch was answered

    async def submit(self, client: Hashable, item: Any, rows: int) -> Any:
        """The result for `item`, after it went with others through `compute`; raises what compute returned or raised for it."""
        now = time.monotonic()
        self.seen[client] = now
        entry = Entry(client, item, rows, asyncio.get_running_loop().create_future(), now)
        self.waiting.append(entry)
        self.arrived.set()
        if self.server is None or self.server.done():
            self.server = asyncio.create_task(self.serve())
        return await entry.future

    def forget(self, client: Hashable) -> None:
        """The client is gone: nobody waits for it."""
        self.seen.pop(client, None)
        self.arrived.set()

    async def serve(self) -> None:
        """Batch after batch, until nobody waits."""
        while self.waiting:
            await self.gather()
            batch = self.take()
            try:
                results = await self.computed([e.item for e in batch])
            except Exception as error:                                              # whatever it was, the clients must hear of it
                results = [error] * len(batch)
            self.free_at = time.monotonic()
            self.totals += (1, sum(e.rows for e in batch), len(batch), sum(self.free_at - e.arrived for e in batch))
            for entry, result in zip(batch, results, strict=True):
                if entry.future.done():                                             # its client gave up
                    continue
                if isinstance(result, Exception):
                    entry.future.set_exception(result)
                else:
                    entry.future.set_result(result)

    async def computed(self, items: list[Any]) -> Sequence[Any]:
        if self.pool is not None:
            return await asyncio.get_running_loop().run_in_executor(self.pool, self.compute, items)
        await asyncio.sleep(0)                                                      # the loop's other work has its turn between two batches
        return self.compute(items)

    async def gather(self) -> None:
        """Wait for the batch to fill, no longer than the first request may wait."""
        now = time.monotonic()
        self.seen = {client: at for client, at in self.seen.items() if now - at < ALIVE_S}
        deadline = max(self.waiting[0].arrived, self.free_at) + self.max_wait_s
        while not self.complete() and (left := deadline - time.monotonic()) > 0:
            self.arrived.clear()
            try:
                await asyncio.wait_for(self.arrived.wait(), left)
            except TimeoutError:
                return

    def complete(self) -> bool:
        return len(self.waiting) >= self.share * len(self.seen) or sum(e.rows for e in self.waiting) >= self.max_rows

    def take(self) -> list[Entry]:
        """The first requests that fit into max_rows; at least one, however large."""
        count, rows = 1, self.waiting[0].rows
        while count < len(self.waiting) and rows + self.waiting[count].rows <= self.max_rows:
            rows += self.waiting[count].rows
            count += 1
        batch, self.waiting = self.waiting[:count], self.waiting[count:]
        return batch
