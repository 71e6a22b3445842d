"""The evaluators as one thing: one beside the training, one for each processor once it is over."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import ray

from modip_ray.actors.evaluator import EvaluatorActor
from modip_ray.actors.placement import options
from modip_ray.actors.supervisor import Supervisor
from modip_ray.config import Config
from modip_ray.learning.build import Spec
from modip_ray.learning.evaluation import Job, Outcome
from modip_ray.learning.system import Report, Snapshot
from modip_ray.runfolder import RunError
from modip_ray.tasks.envs import EnvFactory

PATIENCE = 10                       # time-outs that a group of evaluation episodes may take: they run by thousands of steps
AT_ONCE_S = 0.5                     # how long to look for numbers that can be done without


class Evaluators:
    def __init__(self, cfg: Config, spec: Spec, env_factory: EnvFactory, store: str, replay: str, supervisor: Supervisor):
        self.cfg, self.supervisor, self.call = cfg, supervisor, supervisor.call
        self.arguments = (cfg, spec.obs_dim, spec.action_dim, env_factory, store, replay)
        self.actors: list[Any] = []
        self.more(options(cfg, "evaluator"))
        self.asked: ray.ObjectRef | None = None
        self.give_up_at = 0.0                                                       # when what was asked for has taken too long
        self.finished: list[Report] = []
        self.last_timings: dict[int, Snapshot] = {}

    @property
    def patience_s(self) -> float:
        return PATIENCE * self.cfg.resources.call_timeout_s

    def more(self, resources: dict[str, Any]) -> None:
        actor = EvaluatorActor.options(**resources).remote(*self.arguments)
        self.supervisor.add(f"evaluator {len(self.actors)}", "evaluator", actor)
        self.actors.append(actor)

    def request(self, jobs: Sequence[Job]) -> bool:
        """Evaluate the weights of now beside the training; False while the last request is not finished and reported."""
        if self.busy():
            return False
        self.asked, self.give_up_at = self.actors[0].measure.remote(list(jobs)), time.monotonic() + self.patience_s
        return True

    def busy(self) -> bool:
        """The last request is not finished, or not reported: who asks keeps one candidate, that of the report to come."""
        self.collect(0)
        return self.asked is not None or bool(self.finished)

    def reports(self) -> list[Report]:
        """Those finished since the last call."""
        self.collect(0)
        finished, self.finished = self.finished, []
        return finished

    def collect(self, wait_s: float) -> None:
        """One that takes too long, as an environment hangs, is given up: its process is killed, and the next evaluation finds another."""
        if self.asked is None:
            return
        ready = self.supervisor.wait([self.asked], wait_s)
        if ready:
            self.finished += self.call(ready, "the evaluator")
            self.asked = None
        elif time.monotonic() > self.give_up_at:
            ray.kill(self.actors[0], no_restart=False)
            self.asked = None
            self.supervisor.incidents.append(f"an evaluation on the way was given up after {self.patience_s:g} s ({PATIENCE} x resources.call_timeout_s): does "
                                             "an environment hang?")

    def run_all(self, jobs: Sequence[Job], cpus: int, progress: Callable[[Outcome], None]) -> tuple[list[Outcome], dict[str, Any]]:
        """Every job by whichever evaluator is free, and the diagnostics. More evaluators start where there is room; those that find none do no harm."""
        for _ in range(min(cpus, len(jobs)) - 1):
            self.more(options(self.cfg, "evaluator") | {"num_cpus": 1})
        joining = {actor.ready.remote(): actor for actor in self.actors}
        waiting, free, running, outcomes = list(jobs), [], {}, []
        while waiting or running:
            ready = self.supervisor.wait([*joining, *running], self.patience_s, patient=True)
            if not ready:
                raise RunError(f"no evaluator answered within {PATIENCE} x resources.call_timeout_s; the same command evaluates again")
            for ref in ready:
                if ref in joining:
                    free.append(joining.pop(ref))
                    continue
                free.append(running.pop(ref))
                outcomes += self.call([ref], "an evaluator")
                progress(outcomes[-1])
            while waiting and free:
                actor = free.pop(0)
                running[actor.run.remote(waiting.pop(0))] = actor
        self.collect(max(0.0, self.give_up_at - time.monotonic()))
        (diagnosed,) = self.call([free[0].measure.remote([])], "an evaluator")
        return outcomes, diagnosed.diagnostics

    def timings(self) -> dict[int, Snapshot]:
        """By evaluator; one that is at work, or not there yet, is not waited for."""
        if self.asked is None:
            asked = {actor.timing.remote(): i for i, actor in enumerate(self.actors)}
            ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=AT_ONCE_S)
            self.last_timings |= dict(zip((asked[ref] for ref in ready), self.call(ready, "an evaluator"), strict=True))
        return self.last_timings
