"""The roles that Ray restarts by itself: which one is away, since when and why, and when it is beyond help.

Ray starts a dead actor anew (max_restarts) and makes the calls again that were on their way (max_task_retries); each finds its own last state when it
is built. What is left to do here: notice those that are stopped but not dead and have Ray kill them, wait while one is away, and say so.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnschedulableError, RayActorError, RayError, RayTaskError, RuntimeEnvSetupError

from modip_ray.actors.errors import raise_cause, short
from modip_ray.actors.pulse import Heart, Life, Pulse
from modip_ray.actors.watchdog import Usage, Watchdog
from modip_ray.config import Resources
from modip_ray.runfolder import RoleLost, RunError
from modip_ray.timing import Timer

LOOK_S = 0.5                        # how often the roles are looked at while the driver waits for something
PULSES = 5                          # pulses within the time after which a silent actor counts as stopped
FOR_GOOD = ActorDiedError, RuntimeEnvSetupError, ActorUnschedulableError             # what Ray says of an actor that it does not start again
HOPELESS = 8                        # deaths of a role in a row, without an environment step or update between, that end the run
PROCESSES = "processes.json"


def no_pulses(elapsed_s: float) -> dict[str, Pulse]:
    return {}


class Role:
    """One actor that Ray restarts. revived: called once a new incarnation serves, to give it what only the driver knows. spare: others of its group can do
    its work.
    """

    def __init__(self, name: str, group: str, actor: Any, every_s: float, revived: Callable[[], None] | None, spare: bool = False):
        self.name, self.group, self.actor, self.revived, self.spare = name, group, actor, revived, spare
        self.heart = Heart(actor, every_s)
        self.pulse: Pulse | None = None                                             # the last one; None: it never served
        self.why, self.away_since = "", 0.0                                         # why: "" while it serves
        self.restarts, self.deaths = 0, 0                                           # deaths: since the run last made progress

    @property
    def away(self) -> bool:
        return bool(self.why)


class Supervisor:
    """resources: silent_s, restart_s, call_timeout_s. timer: the driver's. folder: where processes.json is kept (None: nowhere)."""

    def __init__(self, resources: Resources, timer: Timer, folder: Path | None = None):
        self.resources, self.driver, self.folder = resources, Life(timer), folder
        self.roles: dict[str, Role] = {}
        self.workers: Callable[[float], dict[str, Pulse]] = no_pulses               # looks at the rollout workers; their pulses by name
        self.pulses: dict[str, dict[str, Pulse]] = {}                               # role -> name -> pulse, of those that serve
        self.watchdog, self.usage, self.training = Watchdog(), Usage(), True        # training: so that there is progress to be missed
        self.incidents: list[str] = []
        self.restarts: dict[str, int] = {}                                          # by group, those of roles that are gone included
        self.progress, self.looked_at, self.written = (0, 0, 0), time.monotonic(), ""

    def add(self, name: str, group: str, actor: Any, revived: Callable[[], None] | None = None, spare: bool = False) -> Any:
        self.roles[name] = Role(name, group, actor, self.resources.silent_s / PULSES, revived, spare)
        self.restarts.setdefault(group, 0)
        return actor

    def remove(self, group: str) -> None:
        """Its actors are no longer needed, and are killed."""
        for name, role in list(self.roles.items()):
            if role.group == group:
                ray.kill(role.actor)
                del self.roles[name]

    def replace(self, name: str, start: Callable[[], Any], why: str) -> None:
        """Have another actor in the place of one that is away or hangs. That one is gone for good, with the calls that Ray would make again."""
        role = self.roles[name]
        ray.kill(role.actor)
        if not role.away:
            self.lost(role, why)
        if name in self.roles:
            role.actor = start()
            role.heart = Heart(role.actor, role.heart.every_s)

    @property
    def away(self) -> list[Role]:
        return [role for role in self.roles.values() if role.away]

    def progressed(self, *counts: int) -> None:
        """Counts of the run; a role's deaths count in a row while none of these rises above what it was."""
        if any(new > old for new, old in zip(counts, self.progress, strict=True)):
            self.progress = tuple(map(max, counts, self.progress))
            self.watchdog.progressed(self.pulses)
            for role in self.roles.values():
                role.deaths = 0

    # ---- looking -----------------------------------------------------------------------------------------------------------------------------

    def look(self) -> None:
        """Who died, who is silent, who serves again. RunError for one that is beyond help."""
        now = time.monotonic()
        elapsed, self.looked_at = min(now - self.looked_at, 2 * LOOK_S), now        # not what the driver itself slept: nobody could have been heard
        for role in list(self.roles.values()):
            found = role.heart.beat(elapsed)
            if isinstance(found, Pulse):
                self.heard(role, found)
            elif isinstance(found, FOR_GOOD):
                self.give_up(role, f"died and cannot be started again ({short(found)})")
            elif found is not None:
                self.lost(role, "died" if isinstance(found, RayActorError) else f"died ({type(found).__name__})")
            elif role.away and now - role.away_since > self.resources.restart_s:
                self.give_up(role, f"{role.why} and does not serve again since {self.resources.restart_s:g} s (resources.restart_s)")
            elif role.away or role.pulse is None or role.heart.silent_s < LOOK_S:
                continue
            elif not role.heart.alive():
                self.lost(role, "died")
            elif role.heart.silent_s > self.resources.silent_s:
                ray.kill(role.actor, no_restart=False)                              # also a stopped process: Ray kills it after 5 s
                self.lost(role, f"did not answer for {self.resources.silent_s:g} s (resources.silent_s) and was killed")
        self.pulses = {"driver": {"the driver": self.driver.pulse()}}
        for role in self.roles.values():
            if role.pulse is not None and not role.away:
                self.pulses.setdefault(role.group, {})[role.name] = role.pulse
        workers = self.workers(elapsed)
        if workers:
            self.pulses["rollout"] = workers
        self.write_processes()
        words = self.watchdog.look(elapsed, self.pulses, {r.name: f"{r.why} {now - r.away_since:.0f} s ago" for r in self.away}) if self.training else None
        if words is not None:
            self.incidents.append(words)

    def lost(self, role: Role, why: str) -> None:
        if not role.away:
            role.why, role.away_since = why, time.monotonic()
        role.deaths += 1
        if role.deaths >= HOPELESS:
            self.give_up(role, f"died {role.deaths} times in a row without any progress between; look at the memory of its node and at Ray's logs")

    def give_up(self, role: Role, why: str) -> None:
        """The role is forgotten. RoleLost, unless another one serves that can do its work: a last checkpoint of what is left can be tried."""
        ray.kill(role.actor)
        del self.roles[role.name]
        if role.spare and any(other.group == role.group and other.pulse is not None and not other.away for other in self.roles.values()):
            self.incidents.append(f"{role.name} {why}; others do its work")
            return
        raise RoleLost(f"{role.name} {why}; the same command resumes from the last checkpoint")

    def heard(self, role: Role, pulse: Pulse) -> None:
        before, role.pulse = role.pulse, pulse
        if before is not None and before.incarnation != pulse.incarnation:
            seconds = time.monotonic() - role.away_since if role.away else 0.0
            role.restarts += 1
            self.restarts[role.group] += 1
            self.incidents.append(f"{role.name} {role.why or 'died'}; it serves again after {seconds:.1f} s{pulse.note and ', ' + pulse.note}")
            if role.revived is not None:
                role.revived()
        role.why = ""

    def take_incidents(self) -> list[str]:
        incidents, self.incidents = self.incidents, []
        return incidents

    # ---- waiting -----------------------------------------------------------------------------------------------------------------------------

    def wait(self, refs: Sequence[ray.ObjectRef], timeout_s: float, num_returns: int = 1, patient: bool = False) -> list[ray.ObjectRef]:
        """Those that are ready, after at least num_returns are, or timeout_s. patient: time for which a role is away does not count."""
        refs, waited, at = list(refs), 0.0, time.monotonic()
        while True:
            ready, _ = ray.wait(refs, num_returns=num_returns, timeout=max(0.0, min(LOOK_S, timeout_s - waited)))
            if len(ready) >= num_returns or waited >= timeout_s:
                return ray.wait(refs, num_returns=len(refs), timeout=0)[0]
            self.look()
            now = time.monotonic()
            waited, at = waited + (0.0 if patient and self.away else now - at), now

    def call(self, refs: Sequence[ray.ObjectRef], who: str) -> list[Any]:
        """Results, or RunError naming who died or did not answer in time; errors that an actor raised come as they are."""
        refs, limit = list(refs), self.resources.call_timeout_s
        if refs and len(self.wait(refs, limit, len(refs), patient=True)) < len(refs):
            raise RunError(f"{who} did not answer within {limit:g} s (resources.call_timeout_s); the same command resumes from the last checkpoint")
        try:
            return ray.get(refs)
        except RayTaskError as error:
            raise_cause(error, who)
        except RayError as error:
            raise RunError(f"{who} died ({short(error)}); the same command resumes from the last checkpoint") from error

    # ---- facts -------------------------------------------------------------------------------------------------------------------------------

    def processes(self) -> dict[str, list[int]]:
        """Process ids by role, of those that serve."""
        return {group: [pid for pulse in pulses.values() for pid in (pulse.pid, *pulse.helpers)] for group, pulses in self.pulses.items()}

    def gauges(self) -> dict[str, float]:
        """By role: restarts since this process began, memory, references, waits; and how full Ray's object store is."""
        total, free = (resources().get("object_store_memory", 0.0) for resources in (ray.cluster_resources, ray.available_resources))
        restarts = {f"{group}/restarts": float(n) for group, n in self.restarts.items()}
        return restarts | self.usage.gauges(self.pulses, time.monotonic()) | {"ray/object_store_mb": max(0.0, total - free) / 2**20}

    def write_processes(self) -> None:
        """The same in a file, for who looks from outside; written when it changes."""
        text = json.dumps(self.processes(), indent=1)
        if self.folder is not None and text != self.written:
            partial, self.written = self.folder / f".{PROCESSES}.partial", text
            with suppress(OSError):                                                 # a full disk is for the journal and the checkpoints to say
                partial.write_text(text)
                os.replace(partial, self.folder / PROCESSES)
