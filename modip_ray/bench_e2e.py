"""What distribution costs: milliseconds of an environment step in one process and on Ray, with the same planning batches and no learning."""

from __future__ import annotations

import time

from modip_ray.config import Config
from modip_ray.learning.build import build_spec
from modip_ray.learning.env_source import env_factory, spaces
from modip_ray.learning.offline_data import policy_of
from modip_ray.learning.system import Setup, System
from modip_ray.tasks.collect import collect

STEPS = 1600
WARM_UP = 160


def overhead(cfg: Config, steps: int = STEPS) -> tuple[float, float]:
    """(serial, Ray) milliseconds per environment step: one worker with all environments, so that both plan for the same rows at a time."""
    envs = cfg.rollout.least * cfg.rollout.envs_per_worker
    cfg = cfg.replace({"rollout.num_workers": 1, "rollout.envs_per_worker": envs, "pretrain.updates": 0, "pretrain.policy_updates": 0,
                       "online.updates_per_step": 0.0, "online.env_steps": WARM_UP + steps, "eval.every_steps": 0, "rollout.segment_length": 20})
    factory = env_factory(cfg.task)
    policy = policy_of("demonstrator", cfg.task.family)
    episodes = collect(policy, factory, 1000, cfg.task.max_episode_steps, cfg.seed)
    _, low, high = spaces(factory)
    setup = Setup(cfg, build_spec(cfg, episodes, low, high), episodes, factory)
    from modip_ray.actors.system import RaySystem
    from modip_ray.learning.serial import SerialSystem
    return timed(SerialSystem(setup)), timed(RaySystem(setup))


def timed(system: System) -> float:
    try:
        first, start = 0, None
        while True:
            status = system.advance("online", 0.2, until=10**12)
            if start is None and status.env_steps >= WARM_UP:
                first, start = status.env_steps, time.perf_counter()
            elif start is not None and (status.done or time.perf_counter() - start > 60):
                return 1e3 * (time.perf_counter() - start) / max(status.env_steps - first, 1)
    finally:
        system.close()
