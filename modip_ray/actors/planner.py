"""The planner role: one async actor that answers all rollout workers' queries in batches."""

from __future__ import annotations

import asyncio
import time
from typing import Any, NamedTuple

import numpy as np
import ray
import torch

from modip_ray.actors.batching import BatchQueue
from modip_ray.actors.weights import load_parts
from modip_ray.config import Config
from modip_ray.learning.build import blank_agent, device_of
from modip_ray.learning.collector import Planned
from modip_ray.planning.planner import Planner
from modip_ray.timing import Timer


class Query(NamedTuple):
    worker: int
    incarnation: str
    obs: np.ndarray
    reset: np.ndarray


class PlanServer:
    """Plans for a list of queries at once. A query that is wrong fails alone. Plain object: the actor below only feeds it."""

    def __init__(self, cfg: Config, planner: Planner):
        self.cfg, self.planner = cfg, planner
        self.incarnations: dict[int, tuple[str, int]] = {}
        self.pending: tuple[dict, int] | None = None

    def __call__(self, queries: list[Query]) -> list[Planned | Exception]:
        self.swap_weights()
        try:
            return self.planned(queries)
        except ValueError as error:
            return [error] if len(queries) == 1 else [self([query])[0] for query in queries]

    def planned(self, queries: list[Query]) -> list[Planned]:
        obs, reset = np.concatenate([q.obs for q in queries]), np.concatenate([q.reset for q in queries])
        slots = [(q.worker, q.incarnation, i) for q in queries for i in range(len(q.obs))]
        for query in queries:
            self.note(query)
        with self.planner.timer("plan"):
            p = self.planner.plan(obs, slots, reset, "mpc", self.cfg.planner.explore)
        ends = np.cumsum([len(q.obs) for q in queries])[:-1]
        parts = zip(np.split(p.actions, ends), np.split(p.plans, ends), np.split(p.gains, ends), strict=True)
        return [Planned(actions, plans, gains, p.version) for actions, plans, gains in parts]

    def note(self, query: Query) -> None:
        """A worker that came back is a new incarnation: the warm starts of its former self go."""
        known = self.incarnations.get(query.worker)
        if known is not None and known[0] != query.incarnation:
            self.planner.warm.forget([(query.worker, known[0], i) for i in range(known[1])])
        self.incarnations[query.worker] = (query.incarnation, len(query.obs))

    def swap_weights(self) -> None:
        """Between two batches: take over what was pulled meanwhile."""
        pending, self.pending = self.pending, None
        if pending is None:
            return
        parts, self.planner.env_steps = pending
        load_parts(self.planner.agent, parts)
        self.planner.version = parts["model"][0] if "model" in parts else self.planner.version


@ray.remote(max_restarts=-1)
class PlannerActor:
    """Stateless but for weights and warm starts, so Ray may restart it: it pulls the weights again."""

    def __init__(self, cfg: Config, obs_dim: int, action_dim: int, store: str, gpus: float):
        torch.set_num_threads(cfg.resources.torch_threads)
        self.cfg, self.store, self.timer = cfg, ray.get_actor(store), Timer()
        agent = blank_agent(cfg, obs_dim, action_dim, device_of(cfg, gpus))
        self.server = PlanServer(cfg, Planner(cfg, agent, seed=cfg.seed, timer=self.timer))
        p = cfg.planner
        self.queue = BatchQueue(self.server, p.max_rows, p.max_wait_ms / 1000, lambda: torch.set_num_threads(cfg.resources.torch_threads))
        self.versions: dict[str, int] = {}
        self.pulling: asyncio.Task | None = None
        self.pulled_at = float("-inf")

    async def plan(self, worker: int, incarnation: str, obs: np.ndarray, reset: np.ndarray) -> Planned:
        """Chunks and plans for a worker's environments, obs (n, Do), reset (n,)."""
        if time.monotonic() - self.pulled_at >= self.cfg.planner.weights_every_s and (self.pulling is None or self.pulling.done()):
            first = self.pulled_at == float("-inf")
            self.pulled_at = time.monotonic()
            self.pulling = asyncio.create_task(self.pull())
            if first:
                await self.pulling                                                  # never plan with the weights of before the training
        return await self.queue.submit((worker, incarnation), Query(worker, incarnation, obs, reset), len(obs))

    async def pull(self) -> None:
        newer, env_steps = await asyncio.wait_for(self.store.newer.remote(self.versions), self.cfg.resources.call_timeout_s)
        wanted = {part: found for part, found in newer.items() if part in ("agent", "policy", "model")}
        before = self.server.pending[0] if self.server.pending is not None else {}
        self.versions |= {part: version for part, (version, _) in wanted.items()}
        self.server.pending = ({**before, **wanted}, env_steps)

    async def status(self) -> dict[str, Any]:
        q = self.queue
        return {"timing": self.timer.snapshot(), "batches": q.batches, "rows": q.rows, "device": str(self.server.planner.device), "versions": self.versions}
