"""All roles as Ray actors, behind the same interface as the serial system. The driver only passes counters and small reports around."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from modip_ray.actors.cluster import Cluster
from modip_ray.actors.evaluator import EvaluatorActor
from modip_ray.actors.learner import LearnerActor, LearnerReport
from modip_ray.actors.planner import PlannerActor
from modip_ray.actors.pool import RolloutPool, raise_cause
from modip_ray.actors.replay import ReplayActor
from modip_ray.actors.weights import WeightStore
from modip_ray.learning.checkpoint import write_state
from modip_ray.learning.evaluation import Job, Outcome
from modip_ray.learning.limiter import STREAMS, Stream
from modip_ray.learning.system import Phase, Report, Setup, Snapshot, Status, saved_bc
from modip_ray.runfolder import RunError
from modip_ray.timing import Timer, merge_snapshots

SLICE_S = 1.0                       # one call of a worker or learner
PATIENCE = 10                       # time-outs that a group of evaluation episodes may take: they run by thousands of steps


class RaySystem:
    def __init__(self, setup: Setup):
        self.setup, self.cfg, self.timer = setup, setup.cfg, Timer()
        self.cluster = Cluster(setup.cfg)
        try:
            self.build()
        except BaseException:
            self.cluster.close()
            raise

    def build(self) -> None:
        cfg, r, checkpoint = self.cfg, self.cfg.resources, self.setup.checkpoint
        spec = self.setup.spec
        self.names = {role: f"{role}-{uuid.uuid4().hex[:8]}" for role in ("store", "replay", "planner")}    # an actor handle among the arguments of
        self.store = WeightStore.options(name=self.names["store"]).remote()         # one that may restart would make Ray warn, hence names
        started = self.store.put.remote("agent", 0, spec.weights)
        self.replay = ReplayActor.options(name=self.names["replay"]).remote(cfg, self.setup.episodes, checkpoint)
        gpus = r.learner_gpus / len(STREAMS)
        learner = LearnerActor.options(num_cpus=r.learner_cpus, num_gpus=gpus)
        self.learners = {s: learner.remote(cfg, spec, s, self.names["replay"], self.names["store"], gpus, checkpoint) for s in STREAMS}
        self.call([started], "the weight store")
        self.counts: dict[Stream, int] = dict(zip(STREAMS, self.call([self.learners[s].settle.remote() for s in STREAMS], "the learners' start"), strict=True))
        planner = PlannerActor.options(name=self.names["planner"], num_cpus=r.planner_cpus, num_gpus=r.planner_gpus)
        self.planner = planner.remote(cfg, spec.obs_dim, spec.action_dim, self.names["store"], r.planner_gpus)     # starts while the learners pre-train
        self.evaluators = [self.evaluator()]
        self.env_steps = self.replay_status()["env_steps"]
        self.pool: RolloutPool | None = None
        self.working: dict[ray.ObjectRef, tuple[Stream, float]] = {}
        self.asked: ray.ObjectRef | None = None
        self.finished: list[Report] = []
        self.snapshots: dict[str, dict[Any, Snapshot]] = {}
        self.bc = saved_bc(checkpoint)
        if self.bc is not None:
            self.call([self.store.put.remote("bc", 0, self.bc)], "the weight store")

    def evaluator(self) -> Any:
        spec = self.setup.spec
        return EvaluatorActor.remote(self.cfg, spec.obs_dim, spec.action_dim, self.setup.env_factory, self.names["store"], self.names["replay"])

    # ---- training ----------------------------------------------------------------------------------------------------------------------------

    def advance(self, phase: Phase, seconds: float, until: int) -> Status:
        deadline, metrics, done = time.monotonic() + seconds, {}, False
        while not done and time.monotonic() < deadline:
            if phase == "online":
                self.collect()
            done = self.is_done(phase)
            if not done:
                self.keep_learners_busy()
                for report in self.learner_reports(max(0.0, min(SLICE_S / 2, deadline - time.monotonic()))):
                    metrics |= report.metrics
        returns, incidents = self.pool_news()
        return Status(self.env_steps, self.counts["model"], self.counts["policy"], done, metrics, returns, incidents)

    def is_done(self, phase: Phase) -> bool:
        """All updates made that may be; online, all environment steps stored as well."""
        status = self.replay_status()
        self.env_steps = status["env_steps"]
        self.call([self.store.set_env_steps.remote(self.env_steps)], "the weight store")
        collected = phase == "pretrain" or self.env_steps >= self.cfg.online.env_steps
        return collected and all(self.counts[s] >= status["allowed"][s] for s in STREAMS)

    def collect(self) -> None:
        """Hand out the environment steps that are left; when all are executed, have the open segments sent."""
        target = self.cfg.online.env_steps
        if self.env_steps >= target:
            return
        if self.pool is None:
            self.pool = RolloutPool(self.setup, self.names["planner"], self.names["replay"], self.env_steps)
        pool = self.pool
        pool.gather()
        pool.collect(target - pool.taken, SLICE_S)
        if pool.taken >= target and pool.idle():
            with self.timer("wait/flush"):
                pool.flush()
            self.env_steps = self.replay_status()["env_steps"]
            pool.stored(self.env_steps)

    def keep_learners_busy(self) -> None:
        """Two calls of each learner in flight: the next slice begins when the last one ends."""
        for stream in STREAMS:
            for _ in range(2 - sum(s == stream for s, _ in self.working.values())):
                self.working[self.learners[stream].work.remote(SLICE_S)] = (stream, time.monotonic())

    def learner_reports(self, wait_s: float) -> list[LearnerReport]:
        """Reports that are there, all of them, after waiting for the first one."""
        with self.timer("wait/learners"):
            ray.wait(list(self.working), num_returns=1, timeout=wait_s)
        ready, _ = ray.wait(list(self.working), num_returns=len(self.working), timeout=0)
        reports = self.call(ready, "a learner")
        for ref in ready:
            del self.working[ref]
        for report in reports:
            self.counts[report.stream] = report.count
            self.snapshots.setdefault("learner", {})[report.stream] = report.timing
        oldest = min((at for _, at in self.working.values()), default=time.monotonic())
        if time.monotonic() - oldest > self.cfg.resources.call_timeout_s + 2 * SLICE_S:
            raise RunError(f"a learner did not answer for {self.cfg.resources.call_timeout_s:g} s (resources.call_timeout_s); "
                           "the same command resumes from the last checkpoint")
        return reports

    def pool_news(self) -> tuple[list[float], list[str]]:
        if self.pool is None:
            return [], []
        returns, incidents = self.pool.returns, self.pool.incidents
        self.pool.returns, self.pool.incidents = [], []
        return returns, incidents

    def replay_status(self) -> dict[str, Any]:
        return self.call([self.replay.status.remote()], "the replay")[0]

    def freeze_bc(self) -> None:
        self.settle()
        self.bc = self.call([self.learners["policy"].weights.remote()], "the policy learner")[0].copy()
        self.call([self.store.put.remote("bc", 0, self.bc)], "the weight store")

    def settle(self) -> None:
        """Let the learners' calls in flight end, and have their newest weights in the store."""
        while self.working:
            self.learner_reports(SLICE_S)
        self.call([learner.settle.remote() for learner in self.learners.values()], "a learner")

    def save(self, folder: Path) -> None:
        with self.timer("checkpoint"):
            parts = [self.replay, *self.learners.values()]
            self.call([actor.save.remote(str(folder)) for actor in parts], "a checkpoint part")
            if self.bc is not None:
                write_state(folder, "bc", {"policy": self.bc})

    # ---- evaluation --------------------------------------------------------------------------------------------------------------------------

    def request_evaluation(self, jobs: Sequence[Job]) -> bool:
        self.collect_report(0)
        if self.asked is not None:
            return False
        self.asked = self.evaluators[0].measure.remote(list(jobs))
        return True

    def reports(self) -> list[Report]:
        self.collect_report(0)
        finished, self.finished = self.finished, []
        return finished

    def collect_report(self, wait_s: float | None) -> None:
        if self.asked is None:
            return
        ready, _ = ray.wait([self.asked], timeout=wait_s)
        if ready:
            self.finished += self.call(ready, "the evaluator")
            self.asked = None

    def evaluate(self, jobs: Sequence[Job], progress: Callable[[Outcome], None]) -> Report:
        """Jobs go to whichever evaluator is free; there is one for each processor, and training has made room."""
        self.settle()
        self.remember_timings()
        self.stop_training()
        self.call([self.store.set_env_steps.remote(self.env_steps)], "the weight store")
        self.evaluators += [self.evaluator() for _ in range(min(self.cluster.cpus(), len(jobs)) - 1)]
        waiting, running, outcomes = list(jobs), {}, []
        diagnosis = None
        free = list(self.evaluators)
        while waiting or running:
            while waiting and free:
                actor = free.pop(0)
                running[actor.run.remote(waiting.pop(0))] = actor
            ready, _ = ray.wait(list(running), num_returns=1, timeout=PATIENCE * self.cfg.resources.call_timeout_s)
            if not ready:
                raise RunError(f"no evaluator answered within {PATIENCE} x resources.call_timeout_s; the same command evaluates again")
            for ref in ready:
                free.append(running.pop(ref))
                outcomes += self.call([ref], "an evaluator")
                progress(outcomes[-1])
            if not waiting and diagnosis is None and free:
                diagnosis = free[0].measure.remote([])
        if self.asked is not None:
            self.collect_report(self.cfg.resources.call_timeout_s)
        diagnosed = self.call([diagnosis], "an evaluator")[0]
        return Report(self.env_steps, self.counts["model"], outcomes, diagnosed.diagnostics)

    def stop_training(self) -> None:
        if self.pool is not None:
            self.pool.close()
        for actor in (self.planner, *self.learners.values()):
            ray.kill(actor)
        self.planner, self.learners = None, {}

    # ---- the rest ----------------------------------------------------------------------------------------------------------------------------

    def timings(self) -> dict[str, tuple[Snapshot, int]]:
        self.remember_timings()
        found = {role: (merge_snapshots(parts.values()), len(parts)) for role, parts in self.snapshots.items() if parts}
        return {"driver": (self.timer.snapshot(), 1), **found}

    def gauges(self) -> dict[str, float]:
        workers = len(self.pool.workers) if self.pool is not None else 0
        return {"rollout/workers": float(workers), "replay/ahead": float(self.replay_status()["ahead"])}

    def remember_timings(self) -> None:
        """Newest snapshots by role; actors that are gone keep their last one. An evaluator that is at work is not waited for."""
        self.snapshots["replay"] = {0: self.replay_status()["timing"]}
        if self.planner is not None:
            self.snapshots["planner"] = {0: self.call([self.planner.status.remote()], "the planner")[0]["timing"]}
        if self.pool is not None:
            self.snapshots["rollout"] = dict(self.pool.snapshots)
        if self.asked is None:
            self.snapshots["evaluator"] = dict(enumerate(self.call([e.timing.remote() for e in self.evaluators], "an evaluator")))

    def call(self, refs: Sequence[ray.ObjectRef], who: str) -> list[Any]:
        """Results, or RunError naming who died or did not answer in time; errors that an actor raised come as they are."""
        try:
            return ray.get(list(refs), timeout=self.cfg.resources.call_timeout_s)
        except GetTimeoutError as error:
            limit = f"{self.cfg.resources.call_timeout_s:g} s (resources.call_timeout_s)"
            raise RunError(f"{who} did not answer within {limit}; the same command resumes from the last checkpoint") from error
        except RayTaskError as error:
            raise_cause(error, who)
        except RayActorError as error:
            raise RunError(f"{who} died ({str(error).splitlines()[0]}); the same command resumes from the last checkpoint") from error

    def close(self) -> None:
        self.cluster.close()
