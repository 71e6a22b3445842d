"""What a cluster of many rollout workers would do: a discrete-event model (SimPy) of workers, planners and learner in closed loop.

Every worker steps its groups of environments one after the other; a group that is done asks its planner and waits for the answer. A planner closes
a batch by the rule of actors/batching.py. The learner bounds what may be collected. Checked against real actors in bench/scale.py.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import simpy

WARM_UP = 0.25                      # share of the simulated time that is not counted


@dataclass(frozen=True)
class Fleet:
    """Sizes and costs; all times in seconds."""

    workers: int
    envs_per_worker: int
    groups: int = 2
    planners: int = 1
    step_s: float = 0.005           # one environment step
    plan_s: float = 0.010           # a planning call ...
    row_s: float = 0.00005          # ... and each of its rows
    message_s: float = 0.00013      # processor time of a query, at both ends together (channel.py); the planner's half is serial
    max_rows: int = 512
    max_wait_s: float = 0.002
    steps_per_s_learned: float = float("inf")   # environment steps a second that the learner keeps up with

    @property
    def envs(self) -> int:
        return self.workers * self.envs_per_worker

    @property
    def env_limit(self) -> float:
        """Steps a second of the workers if they never waited."""
        return self.workers / self.step_s

    @property
    def planner_limit(self) -> float:
        """Plans a second of planners that never wait and get all their environments in one call."""
        rows = min(self.max_rows, max(1, self.envs // self.planners))
        return self.planners * rows / (self.plan_s + self.row_s * rows)

    @property
    def loop_limit(self) -> float:
        """The same with half of the environments in a call, since the other half is being stepped: the most that two groups can give."""
        rows = min(self.max_rows, max(1, self.envs // self.planners // 2))
        return self.planners * rows / (self.plan_s + self.row_s * rows)

    @property
    def ideal(self) -> float:
        return min(self.env_limit, self.planner_limit)


@dataclass(frozen=True)
class Prediction:
    steps_per_s: float
    rows_per_batch: float
    answer_s: float                 # from asking to the answer
    worker_busy: float              # shares of the time, 0..1
    planner_busy: float
    learner_busy: float
    saturated: str                  # the role that limits


class Planner:
    """One planner: queries wait in `waiting`; `loop` is its event loop, which reads and answers messages one at a time."""

    def __init__(self, env: simpy.Environment, fleet: Fleet, clients: int):
        self.env, self.fleet, self.clients = env, fleet, clients
        self.waiting: list[tuple[int, float, simpy.Event]] = []
        self.arrived = env.event()
        self.loop = simpy.Resource(env)
        self.batches, self.rows, self.requests, self.waited_s, self.busy_s = 0, 0, 0, 0.0, 0.0

    def ask(self, rows: int) -> simpy.Event:
        answer = self.env.event()
        self.waiting.append((rows, self.env.now, answer))
        if not self.arrived.triggered:
            self.arrived.succeed()
        return answer

    def complete(self) -> bool:
        return len(self.waiting) >= self.clients / self.fleet.groups or sum(rows for rows, _, _ in self.waiting) >= self.fleet.max_rows

    def serve(self) -> Generator:
        env, fleet, free_at = self.env, self.fleet, 0.0
        while True:
            while not self.waiting:
                self.arrived = env.event()
                yield self.arrived
            deadline = max(self.waiting[0][1], free_at) + fleet.max_wait_s
            while not self.complete() and env.now < deadline:
                self.arrived = env.event()
                yield self.arrived | env.timeout(deadline - env.now)
            batch, rows = [], 0
            while self.waiting and (not batch or rows + self.waiting[0][0] <= fleet.max_rows):
                batch.append(self.waiting.pop(0))
                rows += batch[-1][0]
            seconds = fleet.plan_s + fleet.row_s * rows
            yield env.timeout(seconds)
            free_at = env.now
            self.batches, self.rows, self.requests, self.busy_s = self.batches + 1, self.rows + rows, self.requests + len(batch), self.busy_s + seconds
            self.waited_s += sum(env.now - at for _, at, _ in batch)
            for _, _, answer in batch:
                answer.succeed()


class Counter:
    def __init__(self) -> None:
        self.steps, self.busy_s = 0, 0.0


def group(env: simpy.Environment, fleet: Fleet, cpu: simpy.Resource, planner: Planner, done: Counter) -> Generator:
    """One group of a worker's environments: ask, wait, step, for ever."""
    rows = fleet.envs_per_worker // fleet.groups
    while True:
        with planner.loop.request() as turn:
            yield turn
            yield env.timeout(fleet.message_s / 2)
        yield planner.ask(rows)
        with cpu.request() as turn:
            yield turn
            seconds = rows * fleet.step_s + fleet.message_s / 2
            yield env.timeout(seconds)
            done.steps += rows
            done.busy_s += seconds


def predict(fleet: Fleet, rows: int = 60_000) -> Prediction:
    """What the fleet does in steady state, over about so many rows. The learner's limit is applied to the result: the replay holds collection back."""
    env, done, seconds = simpy.Environment(), Counter(), min(max(rows / fleet.ideal, 1.5), 6.0)
    planners = [Planner(env, fleet, len(range(i, fleet.workers, fleet.planners)) * fleet.groups) for i in range(fleet.planners)]
    for planner in planners:
        env.process(planner.serve())
    for w in range(fleet.workers):
        cpu = simpy.Resource(env)
        for _ in range(fleet.groups):
            env.process(group(env, fleet, cpu, planners[w % fleet.planners], done))
    env.run(until=WARM_UP * seconds)
    done.steps, done.busy_s = 0, 0.0
    for planner in planners:
        planner.batches, planner.rows, planner.requests, planner.waited_s, planner.busy_s = 0, 0, 0, 0.0, 0.0
    env.run(until=seconds)
    window = seconds * (1 - WARM_UP)
    free = done.steps / window
    slowed = min(1.0, fleet.steps_per_s_learned / free)
    busy = {"rollout": done.busy_s / window / fleet.workers * slowed, "planner": sum(p.busy_s for p in planners) / window / fleet.planners * slowed,
            "learner": free * slowed / fleet.steps_per_s_learned}
    total = [sum(getattr(p, name) for p in planners) for name in ("rows", "batches", "waited_s", "requests")]
    return Prediction(free * slowed, total[0] / max(total[1], 1), total[2] / max(total[3], 1), busy["rollout"], busy["planner"], busy["learner"],
                      max(busy, key=lambda role: busy[role]))
