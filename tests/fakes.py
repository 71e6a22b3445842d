"""A tiny environment and settings that make a whole run take seconds."""

from __future__ import annotations

import os
import time
from pathlib import Path

import gymnasium as gym
import numpy as np

from modip_ray.config import Config, load
from modip_ray.tasks.collect import collect
from modip_ray.tasks.d4rl_data import write_d4rl

STEPS = 30


class PointEnv(gym.Env):
    """A point in the plane that is paid for being near the origin; it terminates when it leaves the box |x| < 3."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (4,), np.float32)
    action_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = np.concatenate([self.np_random.uniform(-1, 1, 2), np.zeros(2)]).astype(np.float32)
        return self.state.copy(), {}

    def step(self, action):
        self.state[2:] = 0.8 * self.state[2:] + 0.2 * action
        self.state[:2] += 0.2 * self.state[2:]
        reward = 1.0 - float(np.abs(self.state[:2]).sum())
        return self.state.copy(), reward, bool((np.abs(self.state[:2]) > 3).any()), False, {}


class PacedPointEnv(PointEnv):
    """It sleeps POINT_STEP_S seconds a step, an environment variable, so that a test can look at a run that is under way on any machine."""

    def step(self, action):
        time.sleep(float(os.environ.get("POINT_STEP_S", 0)))
        return super().step(action)


class Noisy:
    """Drives to the origin, with noise."""

    def act(self, obs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return np.clip(-0.5 * obs[:, :2] - obs[:, 2:] + 0.3 * rng.standard_normal((len(obs), 2)), -1, 1).astype(np.float32)


def write_data(path: Path, transitions: int = 1500) -> Path:
    write_d4rl(path, collect(Noisy(), PointEnv, transitions, STEPS, seed=0, num_envs=8), {"source": "tests"})
    return path


SMALL = {
    "task.name": "point", "task.env": "tests.fakes:PointEnv", "task.family": None, "task.max_episode_steps": STEPS,
    "policy.width": 32, "policy.blocks": 1, "policy.denoising_steps": 5, "policy.sampling_steps": 3, "policy.batch_size": 32,
    "world_model.latent": 16, "world_model.width": 32, "world_model.batch_size": 32, "critic.width": 16, "critic.members": 2,
    "planner.proposals": 4, "planner.gaussian": 8, "planner.elites": 4, "planner.iterations": 2, "planner.weights_every_s": 0.1,
    "pretrain.updates": 60, "pretrain.policy_updates": 80, "online.env_steps": 400, "online.min_online": 50, "online.updates_per_step": 0.25,
    "replay.capacity": 2000, "replay.samples_per_insert_slack": 100.0, "rollout.envs_per_worker": 3, "rollout.segment_length": 10,
    "eval.episodes": 4, "eval.every_steps": 150, "eval.every_episodes": 2, "eval.bootstrap": 200, "log.tensorboard": False, "log.every_s": 0.2,
    "resources.call_timeout_s": 240.0, "resources.silent_s": 60.0, "log.grace_s": 100.0, "resources.compile": False,
}


def small(run_dir: Path | None = None, data: Path | None = None, **dotted) -> Config:
    """Small settings; dots in keyword names are written as double underscores."""
    more = {"run_dir": str(run_dir)} if run_dir else {}
    more |= {"data.source": str(data)} if data else {}
    return load().replace(SMALL | more | {k.replace("__", "."): v for k, v in dotted.items()})
