"""Answers batches of queries with a run's newest checkpoint, and keeps up with a run that goes on. Plain object, no Ray.

Symbols: B rows, c actions of a chunk, Da size of an action.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from modip_ray.learning.checkpoint import folders, order
from modip_ray.learning.evaluation import EvalMode, modes_of
from modip_ray.policy import RunPolicy, load
from modip_ray.serve.query import Limits, Query

KEPT_ROWS = 2**15                   # of warm starts; beyond them those clients are forgotten that have asked least recently


class Actions(NamedTuple):
    actions: np.ndarray             # (B, c, Da) in the environment's units, to be executed now
    version: str                    # the checkpoint that acted


class Engine:
    """mode: what a query without one gets. A server of "bc" has but that; others answer "policy" and (method modip) "mpc", with the same weights."""

    def __init__(self, run: Path, mode: EvalMode, overrides: Mapping[str, Any] = MappingProxyType({}), seed: int = 0):
        self.run, self.mode, self.overrides = run, mode, dict(overrides)
        self.policy = load(run, mode, seed, overrides)
        self.device = self.policy.planner.device
        modes = ("bc",) if mode == "bc" else (mode, *(m for m in modes_of(self.policy.cfg) if m not in ("bc", mode)))
        self.limits = Limits(self.policy.obs_dim, self.policy.cfg.planner.max_rows, modes)
        self.clients: OrderedDict[str, int] = OrderedDict()                         # rows of each, who asked last at the end
        self.outdated: set[tuple] = set()                                           # warm starts of clients that asked in another mode since
        self.kept = self.rows = self.batches = 0
        self.passed_over, self.problem = "", ""                                     # a checkpoint that cannot be used, and why

    def __call__(self, queries: Sequence[Query]) -> list[Actions | Exception]:
        """One plan for all queries of a mode."""
        policy, answers = self.policy, [None] * len(queries)                        # `follow` may put another policy in place meanwhile
        starts = self.starts(queries, policy)
        for mode in {q.mode for q in queries}:
            which = [i for i, q in enumerate(queries) if q.mode == mode]
            try:
                for i, actions in zip(which, self.acted(policy, mode, [queries[i] for i in which], [starts[i] for i in which]), strict=True):
                    answers[i] = Actions(actions, policy.version)
            except FloatingPointError as error:                                     # training has diverged; the other mode may still act
                for i in which:
                    answers[i] = error
        return answers

    def acted(self, policy: RunPolicy, mode: str, queries: list[Query], starts: list[tuple[list, np.ndarray]]) -> list[np.ndarray]:
        """Actions (B, c, Da) for each query."""
        obs, reset = np.concatenate([q.obs for q in queries]), np.concatenate([q.reset | cold for q, (_, cold) in zip(queries, starts, strict=True)])
        slots = [slot for found, _ in starts for slot in found]
        plan = policy.planner.plan(obs, slots, reset, "mpc" if mode == "mpc" else "policy")
        self.rows, self.batches = self.rows + len(obs), self.batches + 1
        return np.split(plan.actions, np.cumsum([len(q.obs) for q in queries])[:-1])

    def starts(self, queries: Sequence[Query], policy: RunPolicy) -> list[tuple[list, np.ndarray]]:
        """For each query, in the order that they came in: where the planner keeps each row's last plan, and which rows (B,) start cold there.

        Rows of clients without a name always do. So does a named client that asked in another mode since its last plan: that plan is of an earlier moment, if
        not of an episode that has ended.
        """
        found: list[tuple[list, np.ndarray]] = []
        unnamed = 0
        for q in queries:
            slots, cold = [(q.client, i) for i in range(len(q.obs))], np.zeros(len(q.obs), bool)
            if q.mode != "mpc":
                self.outdated |= {(q.client, i) for i in range(self.clients.get(q.client, 0))}
            elif q.client is None:
                slots, cold = [(i,) for i in range(unnamed, unnamed + len(q.obs))], ~cold
                unnamed += len(q.obs)
            else:
                before = self.clients.pop(q.client, 0)
                self.clients[q.client] = now = max(len(q.obs), before)
                self.kept += now - before
                cold = np.array([slot in self.outdated for slot in slots])
                self.outdated.difference_update(slots)
            found.append((slots, cold))
        if self.kept > KEPT_ROWS:
            self.forget(policy)
        return found

    def forget(self, policy: RunPolicy) -> None:
        """A quarter of the warm starts goes at once: that rewrites the planner's table."""
        gone: list[tuple] = []
        while self.kept > KEPT_ROWS * 3 // 4:
            name, rows = self.clients.popitem(last=False)
            gone += [(name, i) for i in range(rows)]
            self.kept -= rows
        policy.planner.warm.forget(gone)
        self.outdated.difference_update(gone)

    def follow(self) -> bool:
        """Whether a newer checkpoint was there and acts from the next batch on. To be called in another thread than the batches."""
        try:
            found = folders(self.run / "checkpoints")                               # a shared file system may be away for a moment
            if not found or found[0].name in (self.policy.version, self.passed_over):
                self.problem = self.refusal(found[0], self.policy) if found and self.passed_over == found[0].name else ""
                return False
            policy = load(self.run, self.mode, 0, self.overrides)                   # an older one where the newest is damaged
        except Exception as error:                                                  # noqa: BLE001 - said; what acts goes on, and the next look may find another
            self.problem = f"{type(error).__name__}: {error}"
            return False
        self.passed_over = "" if order(policy.version) >= order(found[0].name) else found[0].name
        self.problem = self.refusal(found[0], policy) if self.passed_over else ""
        if policy.version == self.policy.version:
            return False
        policy.planner.warm, policy.planner.rng = self.policy.planner.warm, self.policy.planner.rng
        self.policy = policy
        return True

    def refusal(self, damaged: Path, policy: RunPolicy) -> str:
        return f"{damaged} cannot be used, {policy.version} acts"

    def describe(self) -> dict[str, Any]:
        cfg, p = self.policy.cfg, self.policy
        chunk = {m: cfg.planner.n_action_steps if m == "mpc" else cfg.policy.n_action_steps for m in self.limits.modes}
        return {"run": str(self.run), "task": cfg.task.name, "mode": self.mode, "modes": list(self.limits.modes), "version": p.version,
                "env_steps": p.planner.env_steps, "obs_dim": p.obs_dim, "action_dim": p.action_dim, "chunk": chunk, "max_rows": self.limits.max_rows,
                "max_bytes": self.limits.max_bytes, "served": {"rows": self.rows, "batches": self.batches, "clients": len(self.clients)},
                "problem": self.problem or None}
