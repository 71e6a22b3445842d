"""The evaluators as one thing: one beside the training, one for each processor once it is over."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from modip_ray.actors.errors import raise_cause, short
from modip_ray.actors.evaluator import EvaluatorActor
from modip_ray.actors.placement import options
from modip_ray.actors.supervisor import LOOK_S, Supervisor
from modip_ray.config import Config
from modip_ray.learning.build import Spec
from modip_ray.learning.evaluation import Job, Outcome
from modip_ray.learning.system import Report, Snapshot
from modip_ray.runfolder import RunError
from modip_ray.tasks.envs import EnvFactory

PATIENCE = 10                       # time-outs that a group of evaluation episodes may take: they run by thousands of steps
GROUP, FIRST = "evaluator", "evaluator 0"
AT_ONCE_S = 0.5                     # how long to look for numbers that can be done without


class Evaluators:
    def __init__(self, cfg: Config, spec: Spec, env_factory: EnvFactory, store: str, replay: str, supervisor: Supervisor):
        self.cfg, self.supervisor, self.call = cfg, supervisor, supervisor.call
        self.arguments = (cfg, spec.obs_dim, spec.action_dim, env_factory, store, replay)
        self.resources: dict[str, dict[str, Any]] = {}                              # what each was asked for with, by name
        self.more(options(cfg, "evaluator"))
        self.asked: ray.ObjectRef | None = None
        self.give_up_at = 0.0                                                       # when what was asked for has taken too long
        self.finished: list[Report] = []
        self.last_timings: dict[str, Snapshot] = {}

    @property
    def patience_s(self) -> float:
        return PATIENCE * self.cfg.resources.call_timeout_s

    @property
    def actors(self) -> dict[str, Any]:
        """By name; those that were given up are left out."""
        return {name: role.actor for name, role in self.supervisor.roles.items() if role.group == GROUP}

    def more(self, resources: dict[str, Any]) -> None:
        name = f"{GROUP} {len(self.resources)}"
        self.resources[name] = resources
        self.supervisor.add(name, GROUP, self.start(name), spare=True)

    def start(self, name: str) -> Any:
        return EvaluatorActor.options(**self.resources[name]).remote(*self.arguments)

    def request(self, jobs: Sequence[Job]) -> bool:
        """Evaluate the weights of now beside the training; False while the last request is not finished and reported."""
        if self.busy():
            return False
        self.asked, self.give_up_at = self.actors[FIRST].measure.remote(list(jobs)), time.monotonic() + self.patience_s
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
        """One that takes too long, as an environment hangs, is given up: the next evaluation finds another process, which has not got it to do again."""
        if self.asked is None:
            return
        ready = self.supervisor.wait([self.asked], wait_s)
        if FIRST not in self.actors:                                                # it was given up, as others serve
            self.asked = None
        elif ready:
            self.finished += self.call(ready, "the evaluator")
            self.asked = None
        elif time.monotonic() > self.give_up_at:
            self.asked = None
            self.supervisor.replace(FIRST, lambda: self.start(FIRST), f"did not finish an evaluation within {self.patience_s:g} s and was killed")
            self.supervisor.incidents.append(f"an evaluation on the way was given up after {self.patience_s:g} s ({PATIENCE} x resources.call_timeout_s): does "
                                             "an environment hang?")

    def run_all(self, jobs: Sequence[Job], cpus: int, progress: Callable[[Outcome], None]) -> tuple[list[Outcome], dict[str, Any]]:
        """Every job by whichever evaluator is free, and the diagnostics. More evaluators start where there is room; those that find none do no harm."""
        for _ in range(min(cpus, len(jobs)) - 1):
            self.more(options(self.cfg, "evaluator") | {"num_cpus": 1})
        outcomes = []
        for outcome in self.deal("run", jobs):
            outcomes.append(outcome)
            progress(outcome)
        self.collect(max(0.0, self.give_up_at - time.monotonic()))
        (diagnosed,) = self.deal("measure", [[]])
        return outcomes, diagnosed.diagnostics

    def deal(self, method: str, items: Sequence[Any]) -> Iterator[Any]:
        """What `method` answers to each item, as the answers come. Whoever is free gets the next item; those of an evaluator that is away go to others.

        RunError where nobody answers for so long, RoleLost where the last evaluator that served is beyond help; what an environment raises as it is.
        """
        waiting, left, heard_at, there = deque(items), len(items), time.monotonic(), {}  # there: the actors that have said so, by name
        calls: dict[ray.ObjectRef, tuple[str, Any, Any]] = {}                       # whose, by which actor, the item (None: is it there?)
        while left:
            away = {role.name for role in self.supervisor.away}
            for ref, (name, actor, item) in list(calls.items()):
                if item is not None and name in away:                               # Ray would start it again, and have it do the item first
                    self.supervisor.replace(name, lambda name=name: self.start(name), "died")
                if self.actors.get(name) is not actor:
                    del calls[ref]
                    waiting.extendleft([item] if item is not None else [])
            busy = {name for name, _, _ in calls.values()}
            for name, actor in self.actors.items():
                if name not in busy and there.get(name) is not actor:
                    calls[actor.ready.remote()] = name, actor, None
                elif name not in busy and waiting and name not in away:
                    item = waiting.popleft()
                    calls[getattr(actor, method).remote(item)] = name, actor, item
            if not calls:                                                           # whoever is free is away
                time.sleep(LOOK_S)
                self.supervisor.look()
            ready = self.supervisor.wait(list(calls), LOOK_S) if calls else []
            for ref in ready:
                name, actor, item = calls[ref]
                try:
                    answer = ray.get(ref)
                except RayTaskError as error:
                    raise_cause(error, name)
                except RayError as error:                                           # Ray makes calls again to one that it can start again
                    if name in self.supervisor.roles:
                        self.supervisor.give_up(self.supervisor.roles[name], f"died and cannot be started again ({short(error)})")
                    continue
                del calls[ref]
                there[name] = actor
                if item is not None:
                    left -= 1
                    yield answer
            self.collect(0)
            heard_at = time.monotonic() if ready or self.supervisor.away else heard_at
            if time.monotonic() - heard_at > self.patience_s:
                raise RunError(f"no evaluator answered within {PATIENCE} x resources.call_timeout_s; the same command evaluates again")

    def timings(self) -> dict[str, Snapshot]:
        """By evaluator; one that is at work, or not there yet, is not waited for."""
        if self.asked is None:
            asked = {actor.timing.remote(): name for name, actor in self.actors.items()}
            ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=AT_ONCE_S)
            self.last_timings |= dict(zip((asked[ref] for ref in ready), self.call(ready, "an evaluator"), strict=True))
        return self.last_timings
