"""The newest weights by part, as flat vectors with versions: learners put, everyone else pulls what is newer.

Parts: "agent" (everything, as built: normaliser and scales never change), "policy", "model", "target_critic", and "bc" (the frozen policy).
"""

from __future__ import annotations

import time

import numpy as np
import ray

Versions = dict[str, int]
Newer = dict[str, tuple[int, np.ndarray]]


@ray.remote(num_cpus=0, max_restarts=0)
class WeightStore:
    """Keeps its own copies: nothing here lives in the memory of a learner that may die."""

    def __init__(self):
        self.parts: Newer = {}
        self.put_at: dict[str, float] = {}
        self.env_steps = 0

    async def put(self, part: str, version: int, vector: np.ndarray) -> None:
        self.parts[part] = (version, np.array(vector))
        self.put_at[part] = time.monotonic()

    async def set_env_steps(self, env_steps: int) -> None:
        self.env_steps = env_steps

    async def newer(self, known: Versions) -> tuple[Newer, int]:
        """Parts whose version is above the known one (-1: unknown), and the environment steps stored so far."""
        return {part: (v, vector) for part, (v, vector) in self.parts.items() if v > known.get(part, -1)}, self.env_steps

    async def status(self) -> dict[str, tuple[int, float]]:
        """By part: the newest version, and the seconds since it came."""
        now = time.monotonic()
        return {part: (version, now - self.put_at[part]) for part, (version, _) in self.parts.items()}
