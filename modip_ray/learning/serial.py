"""All roles in one process: the same objects as under Ray, one after the other, so a seed gives one result."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from modip_ray.learning.build import agent_of, device_of
from modip_ray.learning.checkpoint import State, write_state
from modip_ray.learning.collector import Collector, Planned
from modip_ray.learning.evaluation import DIAGNOSTIC_ROWS, Job, Outcome, diagnose, run_jobs
from modip_ray.learning.learner import Learner
from modip_ray.learning.limiter import STREAMS, Stream
from modip_ray.learning.replay_server import restored_replay
from modip_ray.learning.system import Counts, Phase, Report, Setup, Snapshot, Status, saved_bc
from modip_ray.learning.updater import Updater, learner_state, load_learner
from modip_ray.model.hardware import go_on, prepare_process
from modip_ray.planning.planner import Planner
from modip_ray.tasks.envs import EnvError, env_seed
from modip_ray.timing import Timer

SLICE = 50                          # updates and environment steps of one `advance`
COLLECTION = "collection"           # checkpoint component


class SerialSystem:
    """Updates come first whenever the limiter allows one; else the environments take a step.

    exact: `advance` stores `until` steps and no more (but for what is stepped together), cutting open segments there; else whole segments, as they close.
    """

    def __init__(self, setup: Setup, exact: bool = False):
        self.setup, self.cfg, self.exact = setup, setup.cfg, exact
        cfg = setup.cfg
        prepare_process(cfg.resources.torch_threads)
        self.timers = {role: Timer() for role in ("driver", "planner", "learner", "rollout", "evaluator")}
        agent = agent_of(cfg, setup.spec, device_of(cfg))
        self.learner = Learner(cfg, agent, cfg.seed)
        self.updater = Updater(cfg, self.learner, self.timers["learner"])
        serial = setup.checkpoint is None or setup.checkpoint.has(COLLECTION)      # else Ray's: what its replay acknowledged since stays
        self.replay = restored_replay(cfg, setup.episodes, setup.checkpoint, setup.folder, exact=serial)
        self.bc = saved_bc(setup.checkpoint)
        if setup.checkpoint is not None:
            for stream in STREAMS:
                load_learner(self.learner, stream, setup.checkpoint.read(f"learner_{stream}"))
        self.taken = self.replay.env_steps                                          # stored steps, and those in open segments
        self.planner = Planner(cfg, agent, seed=cfg.seed + self.taken, timer=self.timers["planner"])
        self.planner.agent = agent                                                  # the learner's own weights: nothing to publish in one process
        self.collector: Collector | None = None
        self.returns: list[float] = []
        self.incidents: list[str] = []
        if setup.checkpoint is not None and serial:
            self.resume_collection(setup.checkpoint.read(COLLECTION))
        self.finished: list[Report] = []

    def advance(self, phase: Phase, seconds: float, until: int) -> Status:
        """A slice ends by counts, not by the clock (unless `seconds` is infinite: then only by `until`), so that a seed's rows and checkpoints are of
        the same updates in every run."""
        done, begun = False, self.slice_number()
        while not done and (math.isinf(seconds) or self.slice_number() == begun):
            stream = self.next_stream()
            if stream is not None:
                with self.timers["driver"]("learn"):
                    with self.timers["learner"]("sample"):
                        batch = self.replay.sample(stream)
                    self.updater.update(stream, batch)
            elif phase == "pretrain" or self.replay.env_steps >= self.cfg.online.env_steps:
                done = True
            elif self.replay.env_steps >= until:
                break
            else:
                with self.timers["driver"]("collect"):
                    self.collect(until if self.exact else self.cfg.online.env_steps)
        (returns, self.returns), (incidents, self.incidents) = (self.returns, []), (self.incidents, [])
        return Status(self.replay.env_steps, self.learner.updates, self.learner.policy_updates, done, self.updater.take_metrics(), returns,
                      incidents + self.updater.take_incidents())

    def slice_number(self) -> int:
        return (self.learner.updates + self.learner.policy_updates + self.taken) // SLICE

    def next_stream(self) -> Stream | None:
        """The stream that is furthest behind among those that may update."""
        limiter = self.replay.limiter
        open_streams = [s for s in STREAMS if limiter.may_sample(s)]
        return min(open_streams, key=lambda s: limiter.granted[s] / limiter.allowed(s)) if open_streams else None

    def collect(self, until: int) -> None:
        """One chunk in every environment; segments that are closed go to the replay, all of them once `until` steps are taken."""
        if self.collector is None:
            self.collector = self.new_collector()
        with self.timers["rollout"]("step"):
            self.taken += self.collector.step(self.plan)
        segments = self.collector.take_segments(flush=self.taken >= until)
        self.replay.add(segments)
        self.returns += [episode.ret for episode in self.collector.take_episodes()]
        self.incidents += [f"{fault}; the environment was made anew" for fault in self.collector.take_faults()]

    def new_collector(self) -> Collector:
        cfg = self.cfg
        return Collector(self.setup.env_factory, cfg.rollout.least * cfg.rollout.envs_per_worker, cfg.task.max_episode_steps, cfg.rollout.segment_length,
                         (cfg.seed, 0, self.taken), f"serial-{self.taken}", self.setup.hook, cfg.rollout.max_env_failures)

    def collection_state(self) -> State:
        """Running episodes, open segments, and the planner's warm starts and generator; where nothing is collected yet, that a serial run was here."""
        if self.collector is None:
            return {"taken": np.array(self.taken)}
        warm = self.planner.warm
        table = warm.table[[warm.rows[i] for i in range(self.collector.group.num_envs)]] if warm.rows else warm.table[:0]
        return {**self.collector.state(), "taken": np.array(self.taken), "planner.rng": self.planner.rng.get_state().numpy(), "warm.plan": table.cpu().numpy()}

    def resume_collection(self, state: State) -> None:
        """Go on in the middle of the episodes; where an environment does not come out where it was, all begin new ones."""
        if state.keys() == {"taken"}:
            return
        self.collector = self.new_collector()
        try:
            self.collector.resume(state)
        except (ValueError, EnvError) as error:
            self.collector.shutdown()
            self.collector = None
            self.incidents.append(f"new episodes instead of the open ones, this run is not the uninterrupted one: {error}")
            return
        self.taken, warm = int(state["taken"]), self.planner.warm
        go_on(self.planner.rng, state["planner.rng"], env_seed(self.cfg.seed, self.taken))
        plans = torch.from_numpy(state["warm.plan"])
        if len(plans):                                                              # none where nothing was planned yet
            rows, _ = warm.index(range(len(plans)), np.ones(len(plans), bool))
            warm.table[rows] = plans.to(warm.table.device)

    def plan(self, obs: np.ndarray, reset: np.ndarray) -> Planned:
        self.planner.version, self.planner.env_steps = self.learner.updates, self.replay.env_steps
        with self.timers["planner"]("plan"):
            p = self.planner.plan(obs, range(len(obs)), reset, "mpc", self.cfg.planner.explore)
        return Planned(p.actions, p.plans, p.gains, p.version)

    def freeze_bc(self) -> None:
        self.bc = self.learner.agent.flat(self.learner.agent.acting_part)

    def save(self, folder: Path) -> Counts:
        for stream, part in learner_state(self.learner).items():
            write_state(folder, f"learner_{stream}", part)
        self.replay.save(folder)
        if self.bc is not None:
            write_state(folder, "bc", {"policy": self.bc})
        write_state(folder, COLLECTION, self.collection_state())
        return {"env_steps": self.replay.env_steps, "updates": self.learner.updates, "policy_updates": self.learner.policy_updates}

    def request_evaluation(self, jobs: Sequence[Job]) -> bool:
        self.finished.append(self.evaluate(jobs))
        return True

    def reports(self) -> list[Report]:
        finished, self.finished = self.finished, []
        return finished

    def evaluate(self, jobs: Sequence[Job], progress: Callable[[Outcome], None] | None = None) -> Report:
        env_steps = self.replay.env_steps
        outcomes = run_jobs(self.cfg, self.learner.agent, self.setup.env_factory, jobs, env_steps, self.bc, self.timers, progress)
        batch = self.replay.diagnostic_batch(DIAGNOSTIC_ROWS, 2 * self.cfg.planner.horizon, self.cfg.eval.seed)
        diagnostics = diagnose(self.cfg, self.learner.agent, batch) | self.replay.plan_statistics()
        return Report(env_steps, self.learner.updates, outcomes, diagnostics)

    def timings(self) -> dict[str, tuple[Snapshot, int]]:
        return {role: (timer.snapshot(), 1) for role, timer in self.timers.items()}

    def gauges(self) -> dict[str, float]:
        return {"replay/ahead": self.replay.limiter.ahead(), "replay/transitions": float(self.replay.replay.online.size),
                "planner/not_finite": float(self.planner.not_finite)}

    def close(self) -> None:
        if self.replay.journal is not None:
            self.replay.journal.close()
            self.replay.journal = None
        if self.collector is not None:
            self.collector.shutdown()
            self.collector = None
