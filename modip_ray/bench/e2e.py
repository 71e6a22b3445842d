"""The whole system on real actors, and each of its stages alone, so that the limit shows; and what distribution costs beside one process."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Literal, NamedTuple

import psutil

from modip_ray.bench.scale import MakeFake, MakeSleeping, Still
from modip_ray.bench.scale_model import Fleet
from modip_ray.config import Config
from modip_ray.learning.build import build_spec
from modip_ray.learning.env_source import env_factory, spaces
from modip_ray.learning.limiter import RateLimiter
from modip_ray.learning.offline_data import policy_of
from modip_ray.learning.system import Phase, Setup, Status, System
from modip_ray.tasks.collect import collect

Stage = Literal["workers", "planner", "learner", "all"]
STAGES: tuple[Stage, ...] = ("workers", "planner", "learner", "all")
WARM_UP = 320                       # environment steps, or updates' worth of them, before the clock starts
PATIENCE_S = 90.0
ENDLESS = 10**9
ROLES = {"PlannerActor": "planner", "LearnerActor": "learner", "RolloutWorker": "workers", "ReplayActor": "replay"}


class Measured(NamedTuple):
    steps_per_s: float                      # environment steps; of the learner alone, those that its updates suffice for
    processor_ms: dict[str, float]          # processor time of a step by role; "rest" is the weight store, Ray's own processes and the driver


def setup_of(cfg: Config, stage: Stage | None = None) -> Setup:
    """What a system is built from; of a stage, with as good as nothing in the place of the others."""
    still = stage == "planner"
    factory = MakeSleeping(0.0) if still else env_factory(cfg.task)
    policy = Still() if still else policy_of("demonstrator", cfg.task.family)
    episodes = collect(policy, factory, 1000, cfg.task.max_episode_steps, cfg.seed)
    _, low, high = spaces(factory)
    fleet = Fleet(cfg.rollout.least, cfg.rollout.envs_per_worker, plan_s=0.0, row_s=0.0)
    return Setup(cfg, build_spec(cfg, episodes, low, high), episodes, factory, plan_server=MakeFake(fleet) if stage == "workers" else None)


def online_only(cfg: Config, **dotted: object) -> Config:
    """Collection from the start, in small segments, without end or evaluation."""
    return cfg.replace({"pretrain.updates": 0, "pretrain.policy_updates": 0, "online.env_steps": ENDLESS, "online.min_online": WARM_UP // 2,
                        "eval.every_steps": 0, "rollout.segment_length": 20} | {k.replace("__", "."): v for k, v in dotted.items()})


def measure(cfg: Config, stage: Stage, seconds: float) -> Measured:
    """A stage alone, or all of them together. The learner alone makes both streams of updates side by side, as in the offline phase."""
    from modip_ray.actors.system import RaySystem
    if stage == "learner":
        cfg = online_only(cfg, pretrain__updates=ENDLESS, pretrain__policy_updates=ENDLESS)
    else:
        cfg = online_only(cfg, replay__samples_per_insert_slack=float(WARM_UP), **({} if stage == "all" else {"online__updates_per_step": 0.0}))
    rates = RateLimiter(cfg).rate
    system = RaySystem(setup_of(cfg, stage))

    def steps(status: Status) -> float:
        return status.env_steps if stage != "learner" else min(status.updates / rates["model"], status.policy_updates / rates["policy"])
    try:
        return timed(system, "pretrain" if stage == "learner" else "online", steps, seconds)
    finally:
        system.close()


def timed(system: System, phase: Phase, steps: Callable[[Status], float], seconds: float) -> Measured:
    """From WARM_UP steps on, for so many seconds."""
    end = time.monotonic() + PATIENCE_S
    while (before := steps(system.advance(phase, 0.2, until=ENDLESS))) < WARM_UP and time.monotonic() < end:
        pass
    used, begun = processor_s(), time.monotonic()
    while time.monotonic() - begun < seconds:
        status = system.advance(phase, 0.2, until=ENDLESS)
    done = max(steps(status) - before, 1.0)
    return Measured(done / (time.monotonic() - begun), {role: 1e3 * (s - used[role]) / done for role, s in processor_s().items()})


def processor_s() -> Counter[str]:
    """Seconds of processor time so far, of this process and those that it started, by role."""
    found: Counter[str] = Counter()
    for process in (own := psutil.Process(), *own.children(recursive=True)):
        try:
            used, name = process.cpu_times(), process.name() if process == own else "".join(process.cmdline()[:1])
        except psutil.NoSuchProcess:
            continue
        actor = name.removeprefix("ray::").partition(".")[0]
        found[ROLES.get(actor, "rest")] += used.user + used.system
    return found


def overhead(cfg: Config, seconds: float) -> tuple[float, float]:
    """(serial, Ray) milliseconds per environment step: one worker with all environments, so that both plan for the same rows at a time; no learning."""
    from modip_ray.actors.system import RaySystem
    from modip_ray.learning.serial import SerialSystem
    envs = cfg.rollout.least * cfg.rollout.envs_per_worker
    cfg = online_only(cfg, rollout__num_workers=1, rollout__envs_per_worker=envs, online__updates_per_step=0.0)
    found = []
    for build in (SerialSystem, RaySystem):
        system = build(setup_of(cfg))
        try:
            found.append(1e3 / timed(system, "online", lambda status: status.env_steps, seconds).steps_per_s)
        finally:
            system.close()
    return found[0], found[1]
