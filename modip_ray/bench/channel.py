"""What a query to the planner costs on a socket (actors/channel.py), against a call of a Ray actor with the same content: time, and processor time."""

from __future__ import annotations

import resource
import time
from typing import NamedTuple

import numpy as np
import ray

from modip_ray.actors.channel import Connection, Server
from modip_ray.actors.cluster import Cluster
from modip_ray.config import Config
from modip_ray.learning.collector import Planned, Query

ROWS, OBS_DIM, ACTION_DIM, HORIZON = 4, 17, 6, 3
KEY = b"k" * 32
WARM_UP = 50


class Cost(NamedTuple):
    """Milliseconds of one query."""

    round_trip: float
    processor: float                # at both ends together


def processor_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


@ray.remote(num_cpus=0)
class Echo:
    """Plans of nothing, by both ways."""

    async def plan(self, query: Query) -> Planned:
        n = len(query.obs)
        return Planned(np.zeros((n, 1, ACTION_DIM), np.float32), np.zeros((n, HORIZON, ACTION_DIM), np.float32), np.zeros(n, np.float32), 0)

    async def address(self) -> tuple[str, int]:
        self.server = Server(KEY, self.plan)
        return await self.server.start("127.0.0.1")

    async def processor_s(self) -> float:
        return processor_s()


@ray.remote(num_cpus=0)
class Client:
    def ask(self, echo: ray.actor.ActorHandle, address: tuple[str, int] | None, times: int) -> tuple[float, float]:
        """(seconds, seconds of this processor) of so many queries, one after the other; address None: as actor calls."""
        query = Query((0, 0), "00000000", np.zeros((ROWS, OBS_DIM), np.float32), np.zeros(ROWS, bool))
        line = Connection(address, KEY, 60.0) if address is not None else None
        begun, used = time.perf_counter(), processor_s()
        for _ in range(times):
            if line is None:
                ray.get(echo.plan.remote(query), timeout=60)
            else:
                line.send(query)
                line.receive(ROWS)
        return time.perf_counter() - begun, processor_s() - used


def costs(cfg: Config, seconds: float) -> tuple[Cost, Cost]:
    """(socket, actor call), in turns of a tenth of the time each."""
    cluster = Cluster(cfg)
    try:
        echo, client = Echo.remote(), Client.remote()
        address = ray.get(echo.address.remote(), timeout=60)
        found: dict[tuple[str, int] | None, list[tuple[float, float, int]]] = {address: [], None: []}
        for way in found:
            ray.get(client.ask.remote(echo, way, WARM_UP), timeout=60)
        for _ in range(5):
            for way, measured in found.items():
                times = max(20, int(seconds / 10 / (0.0003 if way is not None else 0.003)))
                before = ray.get(echo.processor_s.remote(), timeout=60)
                wall, used = ray.get(client.ask.remote(echo, way, times), timeout=60)
                measured.append((wall, used + ray.get(echo.processor_s.remote(), timeout=60) - before, times))
        return tuple(Cost(*(1e3 * float(np.median([m[i] / m[2] for m in found[way]])) for i in (0, 1))) for way in (address, None))
    finally:
        cluster.close()
