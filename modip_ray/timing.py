"""Where the time goes: seconds and counts by "/"-separated names. Waits are named wait/<reason>."""

from __future__ import annotations

import time
from collections import defaultdict
from contextlib import contextmanager


class Timer:
    def __init__(self):
        self.seconds: dict[str, float] = defaultdict(float)
        self.counts: dict[str, int] = defaultdict(int)

    @contextmanager
    def __call__(self, name: str):
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start
            self.counts[name] += 1

    def snapshot(self) -> dict[str, dict[str, float]]:
        return {"seconds": dict(self.seconds), "counts": dict(self.counts)}
