"""Plans for several rollout workers at once, between two swaps of the weights. Plain object, no Ray."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import numpy as np

from modip_ray.config import Config
from modip_ray.learning.collector import Planned, Query
from modip_ray.learning.weights import Newer, load_parts
from modip_ray.model.hardware import uses_compile
from modip_ray.planning.compiled import CompileBeside
from modip_ray.planning.planner import Planner


class PlanServer:
    """Plans for a list of queries at once. A query that is wrong fails alone. `start_thread`: to be called first in the thread that plans."""

    def __init__(self, cfg: Config, planner: Planner, start_thread: Callable[[], None] = lambda: None):
        self.cfg, self.planner, self.start_thread = cfg, planner, start_thread
        self.device = str(planner.device)
        self.incarnations: dict[Hashable, tuple[str, int]] = {}
        self.former: set[str] = set()                                               # incarnations that were replaced
        self.pending: tuple[Newer, int] | None = None
        self.compiling = CompileBeside(planner.search) if uses_compile(cfg) else None

    @property
    def not_finite(self) -> int:
        return self.planner.not_finite

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
        """A worker that came back is a new incarnation: the warm starts of its former self go, whose queries are refused (ValueError) from then on."""
        if query.incarnation in self.former:
            raise ValueError(f"rollout worker {query.worker} was replaced: incarnation {query.incarnation} gets no plans any more")
        known = self.incarnations.get(query.worker)
        if known is not None and known[0] != query.incarnation:
            self.former.add(known[0])
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
