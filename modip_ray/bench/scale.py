"""`modip bench scale`: how far a planner's rollout workers scale. The real actors with fake environments and a fake accelerator, which both sleep;
and the model of scale_model.py, compared with them and carried on to 1,000 workers. Workers load this file: no torch here.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

import gymnasium as gym
import numpy as np

from modip_ray.bench.scale_model import Fleet, Prediction, predict
from modip_ray.config import Config
from modip_ray.learning.collector import Planned, Query
from modip_ray.tasks.envs import EnvFactory
from modip_ray.timing import Timer

OBS_DIM, ACTION_DIM = 17, 6
ENVS = 64                           # in all, dealt out among the workers
MEASURED = (4, 8, 16)
PREDICTED = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000)
ENVS_EACH = 4                       # environments of a worker in the predictions
ENOUGH = 0.85
SETTLE_S = 2.0


class SleepingEnv(gym.Env):
    """An environment whose step takes `step_s` seconds and no processor time."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (OBS_DIM,), np.float32)
    action_space = gym.spaces.Box(-1.0, 1.0, (ACTION_DIM,), np.float32)

    def __init__(self, step_s: float = 0.005):
        self.step_s = step_s

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        return np.zeros(OBS_DIM, np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        if self.step_s:
            time.sleep(self.step_s)
        return np.zeros(OBS_DIM, np.float32), 0.0, False, False, {}


class FakeAccelerator:
    """Plans of nothing, in the time that `fleet` says; in the place of PlanServer."""

    device, pending, start_thread, not_finite = "fake", None, None, 0

    def __init__(self, fleet: Fleet, horizon: int, timer: Timer):
        self.fleet, self.horizon, self.timer = fleet, horizon, timer

    def __call__(self, queries: list[Query]) -> list[Planned]:
        rows = [len(q.obs) for q in queries]
        with self.timer("plan"):
            time.sleep(self.fleet.plan_s + self.fleet.row_s * sum(rows))
        return [Planned(np.zeros((n, 1, ACTION_DIM), np.float32), np.zeros((n, self.horizon, ACTION_DIM), np.float32), np.zeros(n, np.float32), 0)
                for n in rows]


class MakeFake:
    def __init__(self, fleet: Fleet):
        self.fleet = fleet

    def __call__(self, cfg: Config, obs_dim: int, action_dim: int, gpus: float, replica: int, timer: Timer) -> FakeAccelerator:
        return FakeAccelerator(self.fleet, cfg.planner.horizon, timer)


class MakeSleeping:
    def __init__(self, step_s: float):
        self.step_s = step_s

    def __call__(self) -> gym.Env:
        return SleepingEnv(self.step_s)


class Still:
    """A policy that does nothing, for the offline data that a system wants."""

    def act(self, obs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return np.zeros((len(obs), ACTION_DIM), np.float32)


def measure(cfg: Config, fleet: Fleet, seconds: float) -> tuple[float, float, float]:
    """(environment steps a second, rows a batch, milliseconds to an answer) of real actors in steady state; learners idle."""
    from modip_ray.actors.system import RaySystem
    from modip_ray.learning.build import build_spec
    from modip_ray.learning.system import Setup
    from modip_ray.tasks.collect import collect
    cfg = cfg.replace({"rollout.num_workers": fleet.workers, "rollout.envs_per_worker": fleet.envs_per_worker, "rollout.groups": fleet.groups,
                       "planner.replicas": fleet.planners, "planner.max_rows": fleet.max_rows, "planner.max_wait_ms": 1e3 * fleet.max_wait_s,
                       "resources.rollout_cpus": 0.01, "online.updates_per_step": 0.0, "online.env_steps": 10**7, "pretrain.updates": 0,
                       "pretrain.policy_updates": 0, "replay.capacity": 200_000, "task.max_episode_steps": 1000})
    quick: EnvFactory = MakeSleeping(0.0)
    episodes = collect(Still(), quick, 1000, 1000, 0)
    spec = build_spec(cfg, episodes, -np.ones(ACTION_DIM, np.float32), np.ones(ACTION_DIM, np.float32))
    system = RaySystem(Setup(cfg, spec, episodes, MakeSleeping(fleet.step_s), plan_server=MakeFake(fleet)))
    try:
        for wanted in (fleet.workers, fleet.workers):                               # all there; then once more, to settle
            end = time.monotonic() + SETTLE_S
            while system.pool is None or len(system.pool.members) < wanted or time.monotonic() < end:
                system.advance("online", 0.5, until=10**9)
        def totals() -> np.ndarray:                                                 # batches, rows, requests, waited; one row is one step
            return np.sum([p["totals"] for p in system.planner_statuses()], axis=0)
        before, begun = totals(), time.monotonic()
        while time.monotonic() - begun < seconds:
            system.advance("online", 0.5, until=10**9)
        (batches, rows, requests, waited), passed = totals() - before, time.monotonic() - begun
        return rows / passed, rows / batches, 1e3 * waited / requests
    finally:
        system.close()


def predictions(workers: Iterable[int] = PREDICTED, envs_each: int = ENVS_EACH) -> list[tuple[Fleet, Prediction]]:
    """The same costs, more workers: with one planner, and with the fewest that give ENOUGH of what the workers could do."""
    found = []
    for n in workers:
        for planners in range(1, n + 1):
            fleet = Fleet(n, envs_each, planners=planners)
            if planners > 1 and fleet.loop_limit < ENOUGH * fleet.env_limit:
                continue                                                            # cannot be enough: not worth simulating
            found.append((fleet, predict(fleet)))
            if found[-1][1].steps_per_s >= ENOUGH * fleet.env_limit:
                break
    return found


def prediction_table(found: Sequence[tuple[Fleet, Prediction]], updates_per_step: float) -> str:
    """Aligned text. core-h, planner-h: hours of worker processors and of planners for 10^6 environment steps; updates/s: what learning must keep up with."""
    head = ("workers", "planners", "steps/s", "of ideal", "rows/batch", "answer ms", "workers busy", "planners busy", "limited by", "updates/s", "core-h",
            "planner-h")
    lines = [head]
    for fleet, p in found:
        hours = 1e6 / p.steps_per_s / 3600
        lines.append((f"{fleet.workers}", f"{fleet.planners}", f"{p.steps_per_s:.0f}", f"{p.steps_per_s / fleet.ideal:.2f}", f"{p.rows_per_batch:.0f}",
                      f"{1e3 * p.answer_s:.1f}", f"{p.worker_busy:.2f}", f"{p.planner_busy:.2f}", p.saturated, f"{p.steps_per_s * updates_per_step:.0f}",
                      f"{fleet.workers * hours:.2f}", f"{fleet.planners * hours:.2f}"))
    width = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(line, width, strict=True)) for line in lines)
