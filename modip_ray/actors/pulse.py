"""How the driver knows that an actor lives: a call that the actor answers at once, also while it works.

An async actor answers between two awaits; a plain one has a concurrency group for it: `@ray.method(**PULSE)` on a method that returns `Life.pulse()`.
The work itself has no such limit: the first update may compile for minutes.
"""

from __future__ import annotations

import os
import uuid
from typing import Any, NamedTuple

import ray
from ray._private import state
from ray._private.worker import global_worker
from ray.exceptions import RayError, RayTaskError

from modip_ray.runfolder import rss_mb
from modip_ray.timing import WAIT, Timer

GROUP = {"pulse": 1}                                                                # of a plain actor: @ray.remote(concurrency_groups=GROUP)
PULSE = {"concurrency_group": "pulse", "max_task_retries": 0}                       # a pulse that was lost says something: it is not asked for again
ASYNC_PULSE = {"max_task_retries": 0}


class Pulse(NamedTuple):
    """One process at one moment."""

    incarnation: str                # another one after a restart
    pid: int
    rss_mb: float
    refs: int                       # object references that the process holds
    waits: dict[str, float]         # seconds spent waiting so far, by reason; waits that are going on included
    doing: dict[str, float]         # what is going on, by name: for how many seconds
    note: str                       # what it went on from when it began
    helpers: tuple[int, ...] = ()   # ids of further processes that live and die with it


class Life:
    """An actor's side."""

    def __init__(self, timer: Timer, note: str = ""):
        self.timer, self.note, self.incarnation = timer, note, uuid.uuid4().hex[:8]

    def pulse(self) -> Pulse:
        refs = len(global_worker.core_worker.get_all_reference_counts())               # Ray has no public count of them
        waits, doing = waits_of(self.timer), self.timer.going_on()
        return Pulse(self.incarnation, os.getpid(), rss_mb(), refs, waits, doing, self.note)


def waits_of(timer: Timer) -> dict[str, float]:
    """Seconds by reason ("replay", not "wait/replay")."""
    found = {name: s for name, s in timer.snapshot()["seconds"].items() if name.startswith(f"{WAIT}/")}
    for name, seconds in timer.going_on().items():
        if name.startswith(f"{WAIT}/"):
            found[name] = found.get(name, 0.0) + seconds
    return {name.removeprefix(f"{WAIT}/"): s for name, s in found.items()}


class Heart:
    """The driver's side: one question at a time, and how long its answer has been missing."""

    def __init__(self, actor: Any, every_s: float):
        self.actor, self.every_s = actor, every_s
        self.asked: ray.ObjectRef | None = None
        self.silent_s = 0.0                                                         # since the question, less what the driver itself was away
        self.rested_s = every_s                                                     # since the last answer

    def beat(self, elapsed_s: float) -> Pulse | RayError | None:
        """Call it again and again, with the seconds since the last time; the answer, or the error by which Ray says that it is gone, if one came.

        Ray has several for a death: ActorDiedError, OutOfMemoryError (its memory monitor), RuntimeEnvSetupError, ...
        """
        if self.asked is None:
            self.rested_s += elapsed_s
            if self.rested_s >= self.every_s:
                self.asked, self.silent_s = self.actor.pulse.remote(), 0.0
            return None
        ready, _ = ray.wait([self.asked], timeout=0)
        if not ready:
            self.silent_s += elapsed_s
            return None
        self.asked, self.rested_s, self.silent_s = None, 0.0, 0.0
        try:
            return ray.get(ready[0])
        except RayTaskError:                                                        # the method's own error: the process lives
            raise
        except RayError as error:
            self.rested_s = self.every_s                                            # ask at once: when does it serve again?
            return error

    def alive(self) -> bool:
        """Whether Ray takes the process for alive (a question that was asked after its death just waits for the next one)."""
        return state.actors(self.actor._actor_id.hex()).get("State") == "ALIVE"     # the public API for it needs Ray's dashboard
