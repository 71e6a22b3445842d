"""Roll a policy out until enough transitions are gathered, without favouring short episodes."""
from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from modip_ray.tasks.envs import EnvFactory, env_seed
from modip_ray.tasks.episode import Episode
from modip_ray.tasks.rollout import Act, EpisodeRunner


class Policy(Protocol):
    """What collect takes besides an `Act`: e.g. TanhGaussianPolicy."""

    def act(self, obs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """obs (B, Do) -> sampled actions (B, Da)."""


def collect(act_or_policy: Act | Policy, env_factory: EnvFactory, transitions: int, max_episode_steps: int, seed: int, num_envs: int = 32,
            progress: Callable[[int, int], None] | None = None) -> list[Episode]:
    """Complete episodes with at least `transitions` transitions in all.

    Episode k always has the same env seed, and episodes are kept in the order in which they were STARTED (the shortest prefix that suffices):
    keeping them as they end would favour short ones. progress(done, transitions) is called after every round of steps.
    """
    if transitions < 1:
        raise ValueError(f"transitions is {transitions}; at least 1 is needed")
    act = act_or_policy if not hasattr(act_or_policy, "act") else _sampling(act_or_policy, np.random.default_rng([seed, 1]))
    runner = EpisodeRunner(env_factory, num_envs, max_episode_steps)
    finished: dict[int, Episode] = {}
    started = kept = kept_steps = finished_steps = 0
    try:
        while kept_steps < transitions:
            for slot in runner.idle.tolist():
                mean = finished_steps / len(finished) if finished else max_episode_steps
                if finished_steps + np.maximum(runner.running_lengths() + 1, mean).sum() >= transitions:    # enough once all running ones have ended
                    break
                runner.start(slot, started, env_seed(seed, 0, started))
                started += 1
            for number, episode in runner.step(act):
                finished[number] = episode
                finished_steps += episode.length
            while kept in finished and kept_steps < transitions:
                kept_steps += finished[kept].length
                kept += 1
            if progress is not None:
                progress(min(runner.env_steps, transitions), transitions)
    finally:
        runner.close()
    return [finished[k] for k in range(kept)]


def _sampling(policy: Policy, rng: np.random.Generator) -> Act:
    return lambda obs, slots, reset: policy.act(obs, rng)[:, None]

