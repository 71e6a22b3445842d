"""All roles as Ray actors, behind the same interface as the serial system. The driver only passes counters and small reports around."""

from __future__ import annotations

import secrets
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from modip_ray.actors.cluster import Cluster
from modip_ray.actors.evaluators import AT_ONCE_S, Evaluators
from modip_ray.actors.learner import LearnerActor, LearnerReport
from modip_ray.actors.placement import PROBE, options
from modip_ray.actors.planner import PlannerActor
from modip_ray.actors.pool import RolloutPool, raise_cause, short
from modip_ray.actors.replay import ReplayActor
from modip_ray.actors.weights import WeightStore
from modip_ray.config import ConfigError
from modip_ray.learning.checkpoint import write_state
from modip_ray.learning.evaluation import Job, Outcome
from modip_ray.learning.limiter import STREAMS, Stream
from modip_ray.learning.system import Counts, Phase, Report, Setup, Snapshot, Status, saved_bc
from modip_ray.runfolder import RunError
from modip_ray.timing import Timer, merge_snapshots

SLICE_S = 1.0                       # one call of a worker or learner


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
        cfg, checkpoint, spec, run = self.cfg, self.setup.checkpoint, self.setup.spec, uuid.uuid4().hex[:8]
        shards, episodes = cfg.replay.shards, self.setup.episodes
        if len(episodes) < shards:
            raise ConfigError(f"replay.shards: got {shards}, but the data have {len(episodes)} episode(s), and each shard needs one")
        self.store_name = f"store-{run}"                                            # names: an actor handle among the arguments of one that may restart
        self.replay_names = [f"replay-{run}-{i}" for i in range(shards)]            # would make Ray warn
        self.planner_names = [f"planner-{run}-{i}" for i in range(cfg.planner.replicas)]
        self.store = WeightStore.options(name=self.store_name, **options(cfg, "store")).remote()
        started = self.store.put.remote("agent", 0, spec.weights)
        self.replays = [ReplayActor.options(name=name, **options(cfg, "replay")).remote(cfg, episodes[i::shards], checkpoint, i, self.setup.folder)
                        for i, name in enumerate(self.replay_names)]
        learner = LearnerActor.options(**options(cfg, "learner"))
        self.learners = {s: learner.remote(cfg, spec, s, self.replay_names, self.store_name, checkpoint) for s in STREAMS}
        self.call([started], "the weight store")
        self.counts: dict[Stream, int] = dict(zip(STREAMS, self.call([self.learners[s].settle.remote() for s in STREAMS], "the learners' start"), strict=True))
        self.check_folder()
        self.key = secrets.token_bytes(32)
        line, make_server = ("127.0.0.1" if self.cluster.private else None, self.key), [self.setup.plan_server] if self.setup.plan_server is not None else []
        planner = [PlannerActor.options(name=name, **options(cfg, "planner")) for name in self.planner_names]
        self.planners = [p.remote(cfg, spec.obs_dim, spec.action_dim, self.store_name, line, i, *make_server) for i, p in enumerate(planner)]
        self.evaluators = Evaluators(cfg, spec, self.setup.env_factory, self.store_name, self.replay_names[0], self.call)
        self.env_steps = self.replay_status()["env_steps"]
        self.pool: RolloutPool | None = None
        self.working: dict[ray.ObjectRef, tuple[Stream, float]] = {}
        self.snapshots: dict[str, dict[Any, Snapshot]] = {}
        self.incidents: list[str] = []                                              # of the learners
        self.totals_before = np.zeros(4)                                            # BatchQueue.totals of all planners at the last gauges
        self.bc = saved_bc(checkpoint)
        if self.bc is not None:
            self.call([self.store.put.remote("bc", 0, self.bc)], "the weight store")

    def check_folder(self) -> None:
        """ConfigError where replay or learners could not write their checkpoint parts into the run's folder."""
        folder, token = self.setup.folder, uuid.uuid4().hex
        if folder is None:
            return
        (folder / PROBE).write_text(token)
        writers = {"replay": self.replays, "learner": list(self.learners.values())}
        for role, actors in writers.items():
            if not all(self.call([actor.sees.remote(str(folder), token) for actor in actors], f"the {role}")):
                raise ConfigError(f"run_dir: {folder} is not seen by the {role}, which lives on another node; put run_dir on storage that all nodes share, or "
                                  f"place the {role} on the driver's node (resources.placement.{role}, as configs/cluster.yaml does)")
        (folder / PROBE).unlink()

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
        incidents, self.incidents = self.incidents + incidents, []
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
            self.pool = RolloutPool(self.setup, self.planner_names, self.replay_names, self.key, self.env_steps)
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
            self.incidents += report.incidents
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
        """Of all shards together; "ahead" of the one that is furthest, "timings" of each."""
        found = self.call([replay.status.remote() for replay in self.replays], "the replay")
        return {"env_steps": sum(s["env_steps"] for s in found), "allowed": {stream: sum(s["allowed"][stream] for s in found) for stream in STREAMS},
                "ahead": max(s["ahead"] for s in found), "transitions": sum(s["transitions"] for s in found),
                "segments": sum(s["segments"] for s in found), "timings": [s["timing"] for s in found]}

    def freeze_bc(self) -> None:
        self.settle()
        self.bc = self.call([self.learners["policy"].weights.remote()], "the policy learner")[0].copy()
        self.call([self.store.put.remote("bc", 0, self.bc)], "the weight store")

    def settle(self) -> None:
        """Let the learners' calls in flight end, and have their newest weights in the store."""
        while self.working:
            self.learner_reports(SLICE_S)
        self.call([learner.settle.remote() for learner in self.learners.values()], "a learner")

    def save(self, folder: Path) -> Counts:
        with self.timer("checkpoint"):
            if self.bc is not None:
                write_state(folder, "bc", {"policy": self.bc})
            updates = dict(zip(self.learners, self.call([a.save.remote(str(folder)) for a in self.learners.values()], "a learner's checkpoint"), strict=True))
            stored = self.call([replay.save.remote(str(folder)) for replay in self.replays], "the replay's checkpoint")
        return {"env_steps": sum(stored), "updates": updates["model"], "policy_updates": updates["policy"]}

    # ---- evaluation --------------------------------------------------------------------------------------------------------------------------

    def request_evaluation(self, jobs: Sequence[Job]) -> bool:
        return self.evaluators.request(jobs)

    def reports(self) -> list[Report]:
        return self.evaluators.reports()

    def evaluate(self, jobs: Sequence[Job], progress: Callable[[Outcome], None]) -> Report:
        """There is an evaluator for each processor, and training has made room."""
        self.settle()
        self.remember_timings()
        self.stop_training()
        self.call([self.store.set_env_steps.remote(self.env_steps)], "the weight store")
        outcomes, diagnostics = self.evaluators.run_all(jobs, self.cluster.cpus(), progress)
        return Report(self.env_steps, self.counts["model"], outcomes, diagnostics)

    def stop_training(self) -> None:
        if self.pool is not None:
            self.pool.close()
        for actor in (*self.planners, *self.learners.values()):
            ray.kill(actor)
        self.planners, self.learners = [], {}

    # ---- the rest ----------------------------------------------------------------------------------------------------------------------------

    def gauges(self) -> dict[str, float]:
        """Workers, batches of the planners since the last call, age of their weights, how full the replay is. A planner that is restarting is left out."""
        replay = self.replay_status()
        found = {f"replay/{k}": float(replay[k]) for k in ("ahead", "transitions", "segments")} | {"replay/stored": float(replay["env_steps"])}
        if self.pool is not None:
            found |= self.pool.gauges()
        planners = self.planner_statuses()
        if not planners:
            return found
        totals = np.sum([p["totals"] for p in planners], axis=0)
        (batches, rows, requests, waited), self.totals_before = np.maximum(totals - self.totals_before, 0), totals
        if batches:
            found |= {"planner/rows_per_batch": rows / batches, "planner/answer_ms": 1e3 * waited / requests}
        newest = self.call([self.store.status.remote()], "the weight store")[0]
        behind = [newest["model"][0] - p["versions"]["model"] for p in planners if "model" in p["versions"]]
        found["planner/not_finite"] = float(sum(p["not_finite"] for p in planners))
        return found | {"planner/queued": float(sum(p["queued"] for p in planners)), "planner/updates_behind": float(max(behind, default=0)),
                        "planner/seconds_behind": newest["model"][1] if any(behind) else 0.0}

    def planner_statuses(self) -> list[dict[str, Any]]:
        """Of those planners that answer at once: one that starts, or that Ray restarts, is left out."""
        found = []
        ready, _ = ray.wait([p.status.remote() for p in self.planners], num_returns=len(self.planners), timeout=AT_ONCE_S) if self.planners else ([], [])
        for ref in ready:
            try:
                found.append(ray.get(ref))
            except RayActorError:
                continue
        return found

    def timings(self) -> dict[str, tuple[Snapshot, int]]:
        self.remember_timings()
        found = {role: (merge_snapshots(parts.values()), len(parts)) for role, parts in self.snapshots.items() if parts}
        return {"driver": (self.timer.snapshot(), 1), **found}

    def remember_timings(self) -> None:
        """Newest snapshots by role; actors that are gone keep their last one. An evaluator that is at work is not waited for."""
        self.snapshots["replay"] = dict(enumerate(self.replay_status()["timings"]))
        self.snapshots.setdefault("planner", {}).update(enumerate(p["timing"] for p in self.planner_statuses()))
        if self.pool is not None:
            self.snapshots["rollout"] = dict(self.pool.snapshots)
        self.snapshots["evaluator"] = self.evaluators.timings()

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
            raise RunError(f"{who} died ({short(error)}); the same command resumes from the last checkpoint") from error

    def close(self) -> None:
        self.cluster.close()
