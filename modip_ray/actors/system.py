"""All roles as Ray actors, behind the same interface as the serial system. The driver only passes counters and small reports around."""

from __future__ import annotations

import secrets
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError, RayTaskError

from modip_ray.actors.cluster import Cluster
from modip_ray.actors.evaluators import AT_ONCE_S, Evaluators
from modip_ray.actors.learner import LearnerActor, LearnerReport
from modip_ray.actors.placement import PROBE, options
from modip_ray.actors.planner import PlannerActor
from modip_ray.actors.pool import GONE, RolloutPool, put_by
from modip_ray.actors.replay import ReplayActor
from modip_ray.actors.supervisor import Supervisor
from modip_ray.actors.weights import WeightStore
from modip_ray.config import ConfigError
from modip_ray.learning.checkpoint import write_state
from modip_ray.learning.evaluation import Job, Outcome
from modip_ray.learning.limiter import STREAMS, Stream
from modip_ray.learning.live import LIVE, open_live
from modip_ray.learning.system import Counts, Phase, Report, Setup, Snapshot, Status, means, saved_bc
from modip_ray.learning.weights import Newer
from modip_ray.runfolder import RunError
from modip_ray.timing import Timer, merge_snapshots

SLICE_S = 1.0                       # one call of a worker or learner


def numbered(name: str, i: int, n: int) -> str:
    return name if n == 1 else f"{name} {i}"


def began_anew(before: Snapshot, now: Snapshot) -> bool:
    """Whether `now` is of another process than `before`: one that goes on never counts less of anything."""
    return any(now["counts"].get(name, 0) < count for name, count in before["counts"].items())


class RaySystem:
    def __init__(self, setup: Setup):
        self.setup, self.cfg, self.timer = setup, setup.cfg, Timer()
        self.cluster = Cluster(setup.cfg)
        self.supervisor = Supervisor(setup.cfg.resources, self.timer, setup.folder / LIVE if setup.folder is not None else None)
        try:
            self.build()
        except BaseException:
            self.close()
            raise

    def build(self) -> None:
        cfg, spec, run = self.cfg, self.setup.spec, uuid.uuid4().hex[:8]
        shards, episodes = cfg.replay.shards, self.setup.episodes
        if len(episodes) < shards:
            raise ConfigError(f"replay.shards: got {shards}, but the data have {len(episodes)} episode(s), and each shard needs one")
        self.store_name = f"store-{run}"                                            # names: an actor handle among the arguments of one that may restart
        self.replay_names = [f"replay-{run}-{i}" for i in range(shards)]            # would make Ray warn
        self.planner_names = [f"planner-{run}-{i}" for i in range(cfg.planner.replicas)]
        folder, checkpoint = self.setup.folder, self.setup.checkpoint
        live = open_live(folder, run) if folder is not None else None
        watch, self.call = self.supervisor, self.supervisor.call
        self.bc, self.final = saved_bc(checkpoint), {}                              # final: all weights, once training is over
        self.env_steps, self.pool = 0, None
        self.kept = agent, shared, *data = [ray.put(x) for x in (spec.weights, spec, *(episodes[i::shards] for i in range(shards)))]
        self.store = watch.add("the weight store", "store", WeightStore.options(name=self.store_name, **options(cfg, "store")).remote(agent),
                               self.restore_weights)
        self.replays = [ReplayActor.options(name=name, **options(cfg, "replay")).remote(cfg, data[i], checkpoint, i, folder)
                        for i, name in enumerate(self.replay_names)]
        learner = LearnerActor.options(**options(cfg, "learner"))
        self.learners = {s: learner.remote(cfg, shared, s, self.replay_names, self.store_name, checkpoint, live) for s in STREAMS}
        for i, actor in enumerate(self.replays):
            watch.add(numbered("the replay", i, shards), "replay", actor)
        for stream, actor in self.learners.items():
            watch.add(f"the {stream} learner", f"learner_{stream}", actor)
        self.counts: dict[Stream, int] = dict(zip(STREAMS, self.call([self.learners[s].settle.remote() for s in STREAMS], "the learners' start"), strict=True))
        self.check_folder()
        self.key = secrets.token_bytes(32)
        line, make_server = ("127.0.0.1" if self.cluster.private else None, self.key), [self.setup.plan_server] if self.setup.plan_server is not None else []
        planner = [PlannerActor.options(name=name, **options(cfg, "planner")) for name in self.planner_names]
        self.planners = [p.remote(cfg, spec.obs_dim, spec.action_dim, self.store_name, line, i, *make_server) for i, p in enumerate(planner)]
        for i, actor in enumerate(self.planners):
            watch.add(numbered("the planner", i, cfg.planner.replicas), "planner", actor)
        self.evaluators = Evaluators(cfg, spec, self.setup.env_factory, self.store_name, self.replay_names[0], watch)
        self.env_steps = self.replay_status()["env_steps"]
        self.working: dict[ray.ObjectRef, tuple[Stream, float]] = {}
        self.snapshots: dict[str, dict[Any, Snapshot]] = {}
        self.totals_before = np.zeros(4)                                            # BatchQueue.totals of all planners at the last gauges
        if self.bc is not None:
            self.restore_weights()

    pool: RolloutPool | None = None
    final: Newer
    kept: list[ray.ObjectRef]           # large arguments of actors that may restart: the copies that Ray makes by itself were gone at times

    def restore_weights(self) -> None:
        """Into the store, which may have begun anew, what only the driver knows, and what idle learners have. Not waited for: an answer that is missing
        is the store's own silence.
        """
        bc = {"bc": (0, self.bc)} if self.bc is not None else {}
        self.restoring = self.store.restore.remote(self.final | bc, self.env_steps)
        self.putting = [learner.settle.remote() for learner in self.learners.values()]

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
        deadline, metrics, done = time.monotonic() + seconds, [], False
        while not done and time.monotonic() < deadline:
            if phase == "online":
                self.collect()
            done = self.is_done(phase)
            if done:
                self.settle()                                                       # a learner that died since its last report catches up before it is saved
            else:
                self.keep_learners_busy()
                metrics += [r.metrics for r in self.learner_reports(max(0.0, min(SLICE_S / 2, deadline - time.monotonic())))]
        self.supervisor.look()
        self.supervisor.progressed(self.env_steps, *self.counts.values())
        returns, incidents = self.pool_news()
        incidents += self.supervisor.take_incidents()
        return Status(self.env_steps, self.counts["model"], self.counts["policy"], done, means(metrics), returns, incidents)

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
            self.pool = RolloutPool(self.setup, self.planner_names, self.replay_names, self.key, self.env_steps, self.supervisor)
        pool = self.pool
        pool.gather()
        pool.collect(target - max(pool.taken, self.env_steps), SLICE_S)             # stored ones of dead workers may be more than they reported
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
            ready = self.supervisor.wait(list(self.working), wait_s)
        reports = self.call(ready, "a learner")
        for ref in ready:
            del self.working[ref]
        for report in reports:
            self.counts[report.stream] = report.count
            self.remember("learner", {report.stream: report.timing})
            self.supervisor.incidents += report.incidents
        if self.supervisor.away:                                                    # it may be one of them, or one that they wait for
            self.working = {ref: (stream, time.monotonic()) for ref, (stream, _) in self.working.items()}
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
        self.bc = self.call([self.learners["policy"].acting.remote()], "the policy learner")[0].copy()
        self.restore_weights()
        self.call([self.restoring], "the weight store")

    def settle(self) -> None:
        """Let the learners' calls in flight end, and have their newest weights in the store."""
        wanted = dict(self.counts)
        while self.working:
            self.learner_reports(SLICE_S)
        while any(n < wanted[s] for s, n in zip(self.learners, self.call([a.settle.remote() for a in self.learners.values()], "a learner"), strict=True)):
            self.call([learner.work.remote(SLICE_S) for learner in self.learners.values()], "a learner")      # one that began anew catches up

    def save(self, folder: Path) -> Counts:
        with self.timer("checkpoint"):
            if self.bc is not None:
                write_state(folder, "bc", {"policy": self.bc})
            updates = dict(zip(self.learners, self.call([a.save.remote(str(folder)) for a in self.learners.values()], "a learner's checkpoint"), strict=True))
            stored = self.call([replay.save.remote(str(folder)) for replay in self.replays], "the replay's checkpoint")
        return {"env_steps": sum(stored), "updates": updates["model"], "policy_updates": updates["policy"]}

    # ---- evaluation --------------------------------------------------------------------------------------------------------------------------

    def request_evaluation(self, jobs: Sequence[Job]) -> bool:
        """Of the weights that a checkpoint right after it holds: the learners' calls end first, and none begins before the next `advance`."""
        if self.evaluators.busy():
            return False
        self.settle()
        return self.evaluators.request(jobs)

    def reports(self) -> list[Report]:
        return self.evaluators.reports()

    def evaluate(self, jobs: Sequence[Job], progress: Callable[[Outcome], None]) -> Report:
        """There is an evaluator for each processor, and training has made room."""
        self.settle()
        self.remember_timings()
        self.call([self.store.set_env_steps.remote(self.env_steps)], "the weight store")
        ((self.final, _),) = self.call([self.store.newer.remote({})], "the weight store")
        self.stop_training()
        outcomes, diagnostics = self.evaluators.run_all(jobs, self.cluster.cpus(), progress)
        incidents = self.supervisor.take_incidents() + [f"{role.name} {role.why}; others did its work" for role in self.supervisor.away]
        return Report(self.env_steps, self.counts["model"], outcomes, diagnostics, incidents)

    def stop_training(self) -> None:
        self.supervisor.training = False
        if self.pool is not None:
            self.pool.close()
        for group in ("planner", *(f"learner_{stream}" for stream in STREAMS)):
            self.supervisor.remove(group)
        self.planners, self.learners = [], {}

    # ---- the rest ----------------------------------------------------------------------------------------------------------------------------

    def gauges(self) -> dict[str, float]:
        """Workers, batches of the planners since the last call, age of their weights, how full the replay is. A planner that is restarting is left out."""
        replay = self.replay_status()
        found = {f"replay/{k}": float(replay[k]) for k in ("ahead", "transitions", "segments")} | {"replay/stored": float(replay["env_steps"])}
        if self.pool is not None:
            found |= self.pool.gauges()
        found |= self.supervisor.gauges()
        planners = self.planner_statuses()
        if not planners:
            return found
        totals = np.sum([p["totals"] for p in planners], axis=0)
        (batches, rows, requests, waited), self.totals_before = np.maximum(totals - self.totals_before, 0), totals
        if batches:
            found |= {"planner/rows_per_batch": rows / batches, "planner/answer_ms": 1e3 * waited / requests}
        version, age_s = self.call([self.store.status.remote()], "the weight store")[0].get("model", (0, 0.0))      # none yet in one that began anew
        behind = [max(0, version - p["versions"]["model"]) for p in planners if "model" in p["versions"]]
        found["planner/not_finite"] = float(sum(p["not_finite"] for p in planners))
        return found | {"planner/queued": float(sum(p["queued"] for p in planners)), "planner/updates_behind": float(max(behind, default=0)),
                        "planner/seconds_behind": age_s if any(behind) else 0.0}

    def planner_statuses(self) -> list[dict[str, Any]]:
        """Of those planners that answer at once, with the number of each as "replica": one that starts, or that Ray restarts, is left out."""
        found = []
        asked = {p.status.remote(): i for i, p in enumerate(self.planners)}
        ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=AT_ONCE_S) if asked else ([], [])
        for ref in ready:
            try:
                found.append(ray.get(ref) | {"replica": asked[ref]})
            except RayTaskError:
                raise
            except RayError:
                continue
        return found

    def timings(self) -> dict[str, tuple[Snapshot, int]]:
        self.remember_timings()
        found = {role: (merge_snapshots(parts.values()), len(parts.keys() - {GONE})) for role, parts in self.snapshots.items() if parts}
        return {"driver": (self.timer.snapshot(), 1), **found}

    def remember_timings(self) -> None:
        """Newest snapshots by role; actors that are gone keep their last one. An evaluator that is at work is not waited for."""
        self.remember("replay", dict(enumerate(self.replay_status()["timings"])))
        self.remember("planner", {p["replica"]: p["timing"] for p in self.planner_statuses()})
        if self.pool is not None:
            self.snapshots["rollout"] = dict(self.pool.snapshots)
        self.remember("evaluator", self.evaluators.timings())

    def remember(self, role: str, found: Mapping[Any, Snapshot]) -> None:
        """Newest snapshots of some of a role's actors. The last one of an actor that began anew is added to those of all that are gone: the role's sum, which
        is what the report sees, falls only where the driver itself is another one.
        """
        parts = self.snapshots.setdefault(role, {})
        for actor, snapshot in found.items():
            if actor in parts and began_anew(parts[actor], snapshot):
                put_by(parts, parts[actor])
            parts[actor] = snapshot

    def processes(self) -> dict[str, list[int]]:
        """Process ids by role: "driver", "store", "replay", "learner_model", "learner_policy", "planner", "evaluator", "rollout"."""
        return self.supervisor.processes()

    def close(self) -> None:
        """On a Ray that goes on the actors would stay, with their processors and locks: nothing frees them as long as this object is known to somebody."""
        if not self.cluster.own:
            with suppress(RayError):                                                # a Ray that is gone itself
                if self.pool is not None:
                    self.pool.close()
                for group in {role.group for role in self.supervisor.roles.values()}:
                    self.supervisor.remove(group)
        self.cluster.close()
