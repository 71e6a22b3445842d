"""The tests' tiny environment with the faults of real simulators, each at random with a probability per step."""

from __future__ import annotations

import time

import numpy as np

from tests.fakes import PointEnv

FAULTS = ("crash", "hang", "nan", "shape")


class FaultyPoint(PointEnv):
    """`faults`: which of FAULTS happen, each with probability `rate` a step. The dice are the operating system's: a repeated episode differs."""

    def __init__(self, faults: tuple[str, ...] = FAULTS, rate: float = 1e-3):
        self.faults, self.rate, self.dice = tuple(faults), rate, np.random.default_rng()

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        for fault in self.faults:
            if self.dice.random() < self.rate:
                if fault == "crash":
                    raise RuntimeError("the simulator crashed")
                if fault == "hang":
                    time.sleep(3600.0)
                obs = np.full_like(obs, np.nan) if fault == "nan" else obs[:-1]
        return obs, reward, terminated, truncated, info
