import os
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest


class CountEnv(gym.Env):
    """Observation (seed mod 1000, step number, last action); reward = step number; terminates after `length(seed)` steps, truncates never by itself."""

    observation_space = gym.spaces.Box(-1e6, 1e6, (3,), np.float64)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, length=lambda seed: 10**9, fault=None):
        self.length, self.fault = length, fault
        self.executed = 0

    def reset(self, *, seed=None, options=None):
        self.seed, self.t, self.last = seed % 1000, 0, 0.0
        self.ends = self.length(seed)
        return np.array([self.seed, 0.0, 0.0]), {}

    def step(self, action):
        self.t += 1
        self.executed += 1
        self.last = float(action[0])
        obs, reward = np.array([self.seed, self.t, self.last]), float(self.t)
        if self.fault is not None:
            obs, reward = self.fault(self, obs, reward)
        return obs, reward, self.t >= self.ends, False, {}


@pytest.fixture
def count_env():
    return CountEnv


@pytest.fixture
def test_data() -> Path:
    folder = os.environ.get("MODIP_TEST_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("real data: set MODIP_TEST_DATA to a folder with the D4RL head files")
    return Path(folder)


@pytest.fixture
def data_file(test_data):
    def find(name: str) -> Path:
        if not (test_data / name).is_file():
            pytest.skip(f"real data: MODIP_TEST_DATA has no {name}")
        return test_data / name
    return find
