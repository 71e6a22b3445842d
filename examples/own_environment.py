"""An environment of your own, a class in a script, with data of a controller: python examples/own_environment.py [key=value ...]"""
import sys

import gymnasium as gym
import numpy as np

from modip_ray.config import load
from modip_ray.run import train
from modip_ray.tasks.collect import collect
from modip_ray.tasks.d4rl_data import write_d4rl


class Reach(gym.Env):
    """A point in the plane that is paid for being near the origin. Both spaces are one-dimensional Boxes; the time limit is a setting."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (4,), np.float32)
    action_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = np.concatenate([self.np_random.uniform(-1, 1, 2), np.zeros(2)]).astype(np.float32)
        return self.state.copy(), {}

    def step(self, action):
        self.state[2:] = 0.8 * self.state[2:] + 0.2 * action
        self.state[:2] += 0.2 * self.state[2:]
        return self.state.copy(), 1.0 - float(np.abs(self.state[:2]).sum()), bool((np.abs(self.state[:2]) > 3).any()), False, {}


class Controller:
    """Whatever you have that acts, however badly: obs (B, 4) -> actions (B, 2)."""

    def act(self, obs, rng):
        return np.clip(-0.3 * obs[:, :2] + 0.5 * rng.standard_normal((len(obs), 2)), -1, 1).astype(np.float32)


if __name__ == "__main__":
    settings = ["task.name=reach", "task.env=own_environment:Reach", "task.family=null", "task.max_episode_steps=100", "data.source=reach.hdf5",
                "run_dir=runs/reach", *sys.argv[1:]]
    cfg = load(overrides=settings)
    write_d4rl(cfg.data.source, collect(Controller(), Reach, 5000, cfg.task.max_episode_steps, seed=0), {"source": "own_environment.py"})
    train(cfg)
