"""The planner role: async actors that answer the rollout workers' queries in batches.

torch is imported when the actor is built: rollout workers load this file to call it, and need none.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from typing import Any

import ray

from modip_ray.actors.batching import BatchQueue
from modip_ray.actors.channel import Server
from modip_ray.actors.pulse import ASYNC_PULSE, Life, Pulse
from modip_ray.config import Config
from modip_ray.learning.collector import Planned, Query
from modip_ray.tasks.envs import env_seed
from modip_ray.timing import Timer

MakeServer = Callable[[Config, int, int, float, int, Timer], Any]


def plan_server(cfg: Config, obs_dim: int, action_dim: int, gpus: float, replica: int, timer: Timer) -> Any:
    """The real thing; `bench scale` puts a fake accelerator in its place."""
    import torch

    from modip_ray.learning.build import blank_agent, device_of
    from modip_ray.learning.plan_server import PlanServer
    from modip_ray.model.hardware import prepare_process
    from modip_ray.planning.planner import Planner
    prepare_process(cfg.resources.torch_threads)
    agent = blank_agent(cfg, obs_dim, action_dim, device_of(cfg, gpus))
    seed = env_seed(cfg.seed, replica, secrets.randbits(32))                        # begun anew or resumed, it does not draw the same noise again
    return PlanServer(cfg, Planner(cfg, agent, seed=seed, timer=timer), lambda: torch.set_num_threads(cfg.resources.torch_threads))


@ray.remote(max_restarts=-1, max_task_retries=-1)
class PlannerActor:
    """Stateless but for weights and warm starts, so Ray may restart it: it pulls the weights again. Queries come by actors/channel.py.

    line: (host to listen on, None: this node's address; key of the run)
    """

    def __init__(self, cfg: Config, obs_dim: int, action_dim: int, store: str, line: tuple[str | None, bytes], replica: int = 0,
                 make_server: MakeServer = plan_server):
        self.cfg, self.store, self.timer = cfg, ray.get_actor(store), Timer()
        self.server = make_server(cfg, obs_dim, action_dim, cfg.resources.planner_gpus, replica, self.timer)
        p = cfg.planner
        self.queue = BatchQueue(self.server, p.max_rows, p.max_wait_ms / 1000, 1 / cfg.rollout.groups, self.server.start_thread)
        self.host, self.line = line[0] or ray.util.get_node_ip_address(), Server(line[1], self.plan, lambda q: self.queue.forget((q.worker, q.incarnation)))
        self.listening: asyncio.Task | None = None
        self.versions: dict[str, int] = {}
        self.pulling: asyncio.Task | None = None
        self.pulled_at = float("-inf")
        self.life = Life(self.timer)

    @ray.method(**ASYNC_PULSE)
    async def pulse(self) -> Pulse:
        return self.life.pulse()

    async def address(self) -> tuple[str, int]:
        """Where queries are answered."""
        if self.listening is None:
            self.listening = asyncio.create_task(self.line.start(self.host))
        return await self.listening

    async def plan(self, query: Query) -> Planned:
        """Chunks and plans for a group of environments."""
        if self.pulling is not None and self.pulling.done():
            self.pulling.result()                                                   # a pull that failed is an error of the planner
        if time.monotonic() - self.pulled_at >= self.cfg.planner.weights_every_s and (self.pulling is None or self.pulling.done()):
            self.pulled_at = time.monotonic()
            self.pulling = asyncio.create_task(self.pull())
        if not self.versions:
            await asyncio.shield(self.pulling)                                      # nobody plans with the weights of before the training
        return await self.queue.submit((query.worker, query.incarnation), query, len(query.obs))

    async def pull(self) -> None:
        newer, env_steps = await asyncio.wait_for(self.store.newer.remote(self.versions), self.cfg.resources.patience_s)
        wanted = {part: found for part, found in newer.items() if part in ("agent", "policy", "model")}
        before = self.server.pending[0] if self.server.pending is not None else {}
        self.versions |= {part: version for part, (version, _) in wanted.items()}
        self.server.pending = ({**before, **wanted}, env_steps)

    async def status(self) -> dict[str, Any]:
        return {"timing": self.timer.snapshot(), "totals": self.queue.totals.copy(), "queued": len(self.queue.waiting), "device": self.server.device,
                "versions": self.versions, "not_finite": self.server.not_finite}
