"""The newest weights by part, as flat vectors with versions: learners put, everyone else pulls what is newer.

Parts: "agent" (everything, as built: normaliser and scales never change), "policy", "model", "target_critic", and "bc" (the frozen policy).
"""

from __future__ import annotations

import asyncio
import time

import numpy as np
import ray

from modip_ray.actors.pulse import ASYNC_PULSE, Life, Pulse
from modip_ray.timing import Timer

Versions = dict[str, int]
Newer = dict[str, tuple[int, np.ndarray]]
LEARNED = {"model", "target_critic", "policy"}


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class WeightStore:
    """Keeps its own copies: nothing here lives in the memory of a learner that may die.

    Killed, it begins with the agent as built. The learners put their parts again by themselves, the driver what only it knows (`restore`); until all of
    that is there `newer` waits, so that nobody acts with old weights.
    """

    def __init__(self, agent: np.ndarray):
        self.parts: Newer = {"agent": (0, np.array(agent))}
        self.put_at: dict[str, float] = {"agent": time.monotonic()}
        self.env_steps = 0
        self.restored = not ray.get_runtime_context().was_current_actor_reconstructed
        self.complete = asyncio.Event()
        self.life = Life(Timer())

    @ray.method(**ASYNC_PULSE)
    async def pulse(self) -> Pulse:
        return self.life.pulse()

    async def put(self, part: str, version: int, vector: np.ndarray) -> None:
        self.parts[part] = (version, np.array(vector))
        self.put_at[part] = time.monotonic()
        if self.restored and LEARNED <= set(self.parts):
            self.complete.set()

    async def restore(self, parts: Newer, env_steps: int) -> None:
        """From the driver, after a restart."""
        self.restored, self.env_steps = True, env_steps
        for part, (version, vector) in parts.items():
            await self.put(part, version, vector)

    async def set_env_steps(self, env_steps: int) -> None:
        self.env_steps = env_steps

    async def newer(self, known: Versions, wait: bool = True) -> tuple[Newer, int]:
        """Parts whose version is above the known one (-1: unknown), and the environment steps stored so far.

        wait=False, for learners: what is there now. One that waited in a store that began anew would keep back the very part that is waited for.
        """
        if wait:
            with self.life.timer("wait/weights"):
                await self.complete.wait()
        return {part: (v, vector) for part, (v, vector) in self.parts.items() if v > known.get(part, -1)}, self.env_steps

    async def status(self) -> dict[str, tuple[int, float]]:
        """By part: the newest version, and the seconds since it came."""
        now = time.monotonic()
        return {part: (version, now - self.put_at[part]) for part, (version, _) in self.parts.items()}
