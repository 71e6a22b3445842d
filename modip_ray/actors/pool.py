"""The rollout workers as one thing: hands out environment steps, gathers reports, brings dead and hung workers back.

RLlib's FaultTolerantActorManager keeps track of health and of requests in flight (two a worker here), and probes actors that Ray restarts. It
asks for `apply` and `ping` only, so the workers need not import RLlib. What it lacks is here: it treats an exception *raised by* a method like
a dead actor (ours are passed on to the user), and it has no time-out for a single call (a hung worker is killed, and Ray restarts it).
"""

from __future__ import annotations

import logging
import time
import warnings
from typing import Any, NoReturn

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from modip_ray.actors.rollout import RolloutReport, RolloutWorker
from modip_ray.config import Config
from modip_ray.learning.system import Setup, Snapshot
from modip_ray.runfolder import RunError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")                                                 # RLlib imports dm_control, which misses a display
    from ray.rllib.utils.actor_manager import FaultTolerantActorManager

IN_FLIGHT = 2
PROBE_S = 0.2


def raise_cause(error: Exception, who: str) -> NoReturn:
    """What an actor's method raised: errors of environments and hooks as they are, Ray's own (another actor that is gone) as RunError."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, RayError):
        raise RunError(f"{who}: {type(cause).__name__}: {str(cause).splitlines()[0]}; the same command resumes from the last checkpoint") from error
    raise cause from error


class RolloutPool:
    def __init__(self, setup: Setup, planner: str, replay: str, taken: int):
        cfg = setup.cfg
        logging.getLogger("ray.rllib.utils.actor_manager").setLevel(logging.CRITICAL)   # what it would log is said in `incidents`
        options = RolloutWorker.options(num_cpus=cfg.resources.rollout_cpus)
        self.workers = [options.remote(cfg, setup.env_factory, setup.hook, i, planner, replay) for i in range(cfg.rollout.least)]
        self.manager = FaultTolerantActorManager(self.workers, max_remote_requests_in_flight_per_actor=IN_FLIGHT)
        self.cfg: Config = cfg
        self.before = taken                                                         # steps stored before these workers existed
        self.totals: dict[str, int] = {}                                            # by incarnation
        self.asked: dict[int, list[int]] = {i: [] for i in range(len(self.workers))}    # steps of the calls in flight, oldest first
        self.heard_at = [time.monotonic()] * len(self.workers)
        self.returns: list[float] = []
        self.incidents: list[str] = []
        self.snapshots: dict[str, Snapshot] = {}
        self.restarts = 0

    @property
    def taken(self) -> int:
        """Environment steps executed, stored or not; those of dead workers as far as they were reported."""
        return self.before + sum(self.totals.values())

    def collect(self, budget: int, seconds: float) -> None:
        """Keep every healthy worker busy while `budget` steps, less what is asked for already, are left."""
        for i in self.manager.healthy_actor_ids():
            while len(self.asked[i]) < IN_FLIGHT:
                left = budget - sum(map(sum, self.asked.values()))
                if left <= 0:
                    return
                steps = max(1, -(-left // (IN_FLIGHT * len(self.workers))))
                if not self.manager.foreach_actor_async("run", tag="run", kwargs={"steps": steps, "seconds": seconds}, remote_actor_ids=[i]):
                    break
                if not self.asked[i]:
                    self.heard_at[i] = time.monotonic()
                self.asked[i].append(steps)

    def gather(self) -> None:
        """Take every report that is ready; note who died, kill who hangs, take back who is restarted."""
        for result in self.manager.fetch_ready_async_reqs(tags="run", timeout_seconds=0.0):
            self.take(result.actor_id, result.ok, result.get())
        now = time.monotonic()
        for i, asked in self.asked.items():
            if asked and now - self.heard_at[i] > self.cfg.resources.call_timeout_s:
                self.lost(i, f"did not answer for {self.cfg.resources.call_timeout_s:g} s (resources.call_timeout_s); it is killed")
                self.manager.set_actor_state(i, healthy=False)
                ray.kill(self.workers[i], no_restart=False)
        if len(self.manager.healthy_actor_ids()) < len(self.workers):
            for i in self.manager.probe_unhealthy_actors(timeout_seconds=PROBE_S, mark_healthy=True):
                self.heard_at[i] = now
                self.restarts += 1
                self.incidents.append(f"rollout worker {i} is back with new episodes")

    def take(self, i: int, ok: bool, found: Any) -> None:
        if ok:
            self.heard_at[i] = time.monotonic()
            self.asked[i] = self.asked[i][1:]
            self.note(found)
        elif isinstance(found, RayActorError) and not isinstance(found, RayTaskError):
            self.lost(i, f"died ({type(found).__name__}); Ray restarts it")
        else:
            raise_cause(found, f"rollout worker {i}")

    def note(self, report: RolloutReport) -> None:
        self.totals[report.incarnation] = report.total
        self.snapshots[report.incarnation] = report.timing
        self.returns += report.returns

    def lost(self, i: int, why: str) -> None:
        if self.asked[i]:
            self.incidents.append(f"rollout worker {i} {why}")
        self.asked[i] = []

    def idle(self) -> bool:
        return not any(self.asked.values())

    def flush(self) -> None:
        """Open segments of all healthy workers into the replay."""
        results = self.manager.foreach_actor("flush", timeout_seconds=self.cfg.resources.call_timeout_s)
        for result in results:
            if result.ok:
                self.note(result.get())
            elif isinstance(result.get(), RayTaskError):
                raise_cause(result.get(), f"rollout worker {result.actor_id}")

    def stored(self, env_steps: int) -> None:
        """After a flush: whatever was executed and is not stored was lost with a worker."""
        self.before, self.totals = env_steps - sum(self.totals.values()), self.totals

    def close(self) -> None:
        self.manager.clear()
