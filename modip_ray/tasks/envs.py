"""Making, checking and stepping one gymnasium environment."""
from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import gymnasium as gym
import numpy as np

EnvFactory = Callable[[], gym.Env]


class EnvError(RuntimeError):
    """An environment misbehaved; the message names its index and what to look at.

    steps : good steps of the chunk before that; crashed: it raised (False: what it returned is of no use)
    """

    def __init__(self, message: str, steps: int = 0, crashed: bool = False):
        super().__init__(message)
        self.steps, self.crashed = steps, crashed

    def __reduce__(self) -> tuple:
        return EnvError, (str(self), self.steps, self.crashed)


def make_env(env_id: str, render_mode: str | None = None, **kwargs: Any) -> gym.Env:
    """gymnasium.make without the out-of-date warning (D4RL's data needs the -v4 ids), without the checker, and WITHOUT a TimeLimit.

    Time limits are applied, and told apart from terminations, by EnvGroup and rollout_episodes (`max_episode_steps`).
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is out of date.*")
        return gym.make(env_id, render_mode=render_mode, **{"disable_env_checker": True, "max_episode_steps": -1, **kwargs})


def make_envs(env_factory: EnvFactory, num_envs: int) -> list[gym.Env]:
    """`num_envs` distinct environments whose spaces are checked (1-d Box observations and actions)."""
    if num_envs < 1:
        raise ValueError(f"num_envs is {num_envs}; at least 1 is needed")
    envs = [env_factory() for _ in range(num_envs)]
    if len({id(env) for env in envs}) < num_envs:
        raise ValueError("env_factory returned the same environment twice; it must make a new one at each call")
    for name in ("observation_space", "action_space"):
        space = getattr(envs[0], name, None)
        if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
            help = "wrap the environment (gymnasium.wrappers.FlattenObservation helps)" if name == "observation_space" else "policies here act in boxes only"
            raise ValueError(f"{name} must be a Box with one dimension, got {space}; {help}")
    return envs


def made_anew(env: gym.Env, env_factory: EnvFactory) -> gym.Env:
    """A new environment in place of one that failed."""
    with suppress(Exception):                                                       # it is broken, and so may its end be
        env.close()
    return env_factory()


def env_seed(*parts: int) -> int:
    """A seed in [0, 2^31) that depends on all `parts` (each >= 0), e.g. (run seed, env index, episode number).

    Their number goes in too: SeedSequence ignores zeros at the end, so (1, 2) and (1, 2, 0) would be the same.
    """
    return int(np.random.SeedSequence((len(parts), *parts)).generate_state(1)[0] >> 1)


def reset_env(env: gym.Env, seed: int, name: str) -> np.ndarray:
    """First observation (Do,) float32 of a new episode; EnvError when its shape or its numbers are wrong."""
    obs = np.asarray(env.reset(seed=seed)[0], dtype=np.float32)
    if obs.shape != env.observation_space.shape:
        raise EnvError(f"{name}: reset returned an observation of shape {obs.shape}, its observation_space says {env.observation_space.shape}")
    if not np.isfinite(obs).all():
        raise EnvError(f"{name}: reset(seed={seed}) returned a non-finite observation {obs}")
    return obs


def run_chunk(env: gym.Env, actions: np.ndarray, next_obs: np.ndarray, rewards: np.ndarray, steps_left: int, name: str) -> tuple[int, bool, bool]:
    """Execute `actions` (c, Da) one by one until the episode ends; write next_obs (c, Do) and rewards (c,) in place.

    steps_left: steps until the time limit. Returns (executed steps, terminated, truncated); only one of the two flags is ever True,
    a termination at the time limit is a termination.
    """
    step, dim, last = env.step, next_obs.shape[1], min(len(actions), steps_left)
    k, returned, terminated, truncated = 0, 0, False, False
    try:
        while k < last and not (terminated or truncated):
            obs, reward, terminated, truncated, _ = step(actions[k])
            returned = k + 1
            if len(obs) != dim:
                raise ValueError(f"observation of {len(obs)} numbers, its observation_space has shape ({dim},)")
            next_obs[k] = obs
            rewards[k] = reward
            k += 1
    except Exception as error:
        raise EnvError(f"{name}: step failed with {type(error).__name__}: {error}", k, crashed=returned == k) from error
    terminated = bool(terminated)
    return k, terminated, not terminated and (bool(truncated) or k == steps_left)


class ActionCheck:
    """Checks a batch of action chunks and clips it to the action space."""

    def __init__(self, space: gym.spaces.Box):
        self.low, self.high, self.dim, self.dtype = space.low, space.high, space.shape[0], space.dtype

    def __call__(self, actions: np.ndarray, slots: Sequence[int] | np.ndarray) -> np.ndarray:
        """Clipped copy of `actions` (m, c, Da), row j being for env slots[j]; ValueError names a wrong shape or the env that got NaN."""
        if getattr(actions, "ndim", None) != 3 or actions.shape[0] != len(slots) or actions.shape[1] < 1 or actions.shape[2] != self.dim:
            raise ValueError(f"actions must have shape ({len(slots)}, chunk >= 1, {self.dim}), got {getattr(actions, 'shape', type(actions).__name__)}")
        finite = np.isfinite(actions)
        if not finite.all():
            row, k, _ = np.argwhere(~finite)[0]
            raise ValueError(f"action {k} of the chunk for env {slots[row]} is not finite: {actions[row, k]}")
        return np.clip(actions, self.low, self.high).astype(self.dtype, copy=False)
