"""The rollout workers as one thing: they join where the cluster has room and leave with their nodes; each gets its share of the steps to collect.

There are rollout.num_workers.max slots, each with an actor of its own. An actor that finds no room yet stays pending, which is what an autoscaler
looks at; once it has answered `hello` it takes part. One that died or hangs is dropped, and a new one is asked for in its slot. RLlib's
FaultTolerantActorManager would track health and calls in flight, but it knows a fixed set of actors that Ray restarts, takes an exception *raised
by* a method for a dead actor, and has no time-out for a call.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from modip_ray.actors.errors import raise_cause
from modip_ray.actors.placement import options
from modip_ray.actors.pulse import Heart, Pulse
from modip_ray.actors.rollout import ENVIRONMENTS, Hello, RolloutReport, RolloutWorker
from modip_ray.actors.supervisor import PULSES, Supervisor, no_pulses
from modip_ray.learning.system import Setup, Snapshot
from modip_ray.runfolder import RunError
from modip_ray.timing import Timer, merge_snapshots

IN_FLIGHT = 2                       # calls to a worker: the next slice begins when the last one ends
HOPELESS = 8                        # deaths of one slot's workers in a row, each without any report, that end the run where no other worker is there
QUIET_DEATHS = 2                    # of workers before they are ready: Ray first puts a new one on the node that it does not know to be dead yet
BACK_OFF_S = 30.0                   # longest pause before a slot whose workers die at once is filled again
LOOK_S = 5.0                        # between looks at a worker that has not said hello
GONE = "gone"                       # among the snapshots of a role: times of all its processes that were lost
ALONE_S = 60.0                      # without any worker for so long: say so


def put_by(snapshots: dict[Any, Snapshot], gone: Snapshot) -> None:
    """Add the times of a process that is gone to those of all that are."""
    snapshots[GONE] = merge_snapshots([snapshots.get(GONE, Timer().snapshot()), gone])


class Slot:
    """A place for a worker: its actor, who it said it is (None: not there yet), and its calls in flight with the steps asked for."""

    def __init__(self, number: int):
        self.number = number
        self.actor: Any = None
        self.hello: ray.ObjectRef | None = None
        self.member: Hello | None = None
        self.heart: Heart | None = None
        self.pulse: Pulse | None = None
        self.calls: dict[ray.ObjectRef, int] = {}
        self.heard_at, self.deaths, self.fill_at = 0.0, 0, 0.0                      # deaths: since its last report
        self.look_at = 0.0                                                          # when it is asked next whether one that says nothing yet has a process

    @property
    def name(self) -> str:
        return f"rollout worker {self.number}"


class RolloutPool:
    def __init__(self, setup: Setup, planners: Sequence[str], replays: Sequence[str], key: bytes, taken: int, supervisor: Supervisor):
        self.supervisor, self.retiring = supervisor, []                             # retiring: what the replay has not confirmed yet
        self.setup, self.cfg, self.planners, self.replays, self.key = setup, setup.cfg, planners, replays, key
        self.before = taken                                                         # steps stored before these workers existed
        self.totals: dict[str, int] = {}                                            # steps executed, by incarnation
        self.acknowledged: dict[str, int] = {}                                      # of them, stored for sure
        self.snapshots: dict[str, Snapshot] = {}
        self.returns: list[float] = []
        self.incidents: list[str] = []
        self.joined, self.lost = 0, 0                                               # counts of events
        self.crashed, self.hung, self.bad = 0, 0, 0                                 # of environments
        self.alone_since = time.monotonic()
        self.audit = setup.folder / "audit" if setup.folder is not None and self.cfg.log.audit else None
        if self.audit is not None:
            self.audit.mkdir(exist_ok=True)
        self.slots = [Slot(i) for i in range(self.cfg.rollout.most)]
        for slot in self.slots:
            self.fill(slot)
        supervisor.workers = self.look

    @property
    def members(self) -> list[Slot]:
        return [slot for slot in self.slots if slot.member is not None]

    @property
    def taken(self) -> int:
        """Environment steps executed, stored or not; those of dead workers as far as they were reported."""
        return self.before + sum(self.totals.values())

    def fill(self, slot: Slot) -> None:
        setup, i = self.setup, slot.number
        slot.actor = RolloutWorker.options(**options(self.cfg, "rollout")).remote(
            self.cfg, setup.env_factory, setup.hook, i, self.planners[i % len(self.planners)], self.replays, self.key, self.audit)
        slot.hello, slot.heard_at = slot.actor.hello.remote(), time.monotonic()

    def collect(self, budget: int, seconds: float) -> None:
        """Keep every worker busy while `budget` steps, less what is asked for already, are left."""
        members = self.members
        left = budget - sum(sum(slot.calls.values()) for slot in members)
        share = max(1, -(-left // (IN_FLIGHT * max(len(members), self.cfg.rollout.least))))
        for slot in members:
            while len(slot.calls) < IN_FLIGHT and left > 0:
                if not slot.calls:
                    slot.heard_at = time.monotonic()
                slot.calls[slot.actor.run.remote(share, seconds)] = share
                left -= share

    def gather(self) -> None:
        """Take every answer that is there; note who joined, drop who died or hangs, and fill their slots."""
        refs = {ref: slot for slot in self.slots for ref in ([slot.hello] if slot.hello is not None else slot.calls)}
        ready, _ = ray.wait(list(refs), num_returns=len(refs), timeout=0) if refs else ([], [])
        there = set(ready)
        for ref, slot in refs.items():                                              # a worker's answers in the order of its calls
            if ref in there and (ref in slot.calls or ref == slot.hello):
                self.take(slot, ref)
        now, limit = time.monotonic(), self.cfg.resources.call_timeout_s
        for slot in self.slots:
            if self.supervisor.away:                                                # it may be waiting for a role that is away
                slot.heard_at = now
            if (slot.calls or self.began(slot, now)) and now - slot.heard_at > limit:
                self.drop(slot, f"did not answer for {limit:g} s (resources.call_timeout_s)")
            if slot.actor is None and now >= slot.fill_at:
                self.fill(slot)
        confirmed, self.retiring = ray.wait(self.retiring, num_returns=len(self.retiring), timeout=0) if self.retiring else ([], [])
        self.supervisor.call(confirmed, "the replay")
        if self.members:
            self.alone_since = now
        elif now - self.alone_since > ALONE_S:
            self.alone_since = now
            self.incidents.append(f"no rollout worker for {ALONE_S:g} s: {len(self.slots)} wait for a node that has {options(self.cfg, 'rollout')}")

    def began(self, slot: Slot, now: float) -> bool:
        """Whether its worker has a process that makes its environments, as far as was looked lately; one that waits for room is heard of all the time."""
        if slot.hello is None or now < slot.look_at:
            return False
        slot.look_at = now + LOOK_S
        if Heart(slot.actor, 0.0).alive():
            return True
        slot.heard_at = now
        return False

    def take(self, slot: Slot, ref: ray.ObjectRef) -> None:
        try:
            found = ray.get(ref)
        except RayTaskError as error:
            raise_cause(error, slot.name)
        except RayError as error:                                                   # not RayActorError alone: out of memory is none
            self.drop(slot, f"died ({type(error).__name__})")
            return
        if ref == slot.hello:
            slot.hello, slot.member, slot.heard_at = None, found, time.monotonic()
            slot.heart = Heart(slot.actor, self.cfg.resources.silent_s / PULSES)
            self.joined += 1
            if self.joined > self.cfg.rollout.least:
                self.incidents.append(f"{slot.name} joined, {len(self.members)} there")
        else:
            slot.heard_at = time.monotonic()
            del slot.calls[ref]
            self.note(slot, found)

    def look(self, elapsed_s: float) -> dict[str, Pulse]:
        """Drop the workers that do not answer; pulses of the others."""
        limit = self.cfg.resources.silent_s
        for slot in self.members:
            found = slot.heart.beat(elapsed_s)
            if isinstance(found, Pulse):
                slot.pulse = found
                self.check_environments(slot, found)
            elif found is not None:
                self.drop(slot, f"died ({type(found).__name__})")
            elif slot.heart.silent_s > limit:
                self.drop(slot, f"did not answer for {limit:g} s (resources.silent_s)")
        return {slot.name: slot.pulse for slot in self.members if slot.pulse is not None}

    def check_environments(self, slot: Slot, pulse: Pulse) -> None:
        """A worker whose environment does not come back from a step is given up: nothing else can end that."""
        limit = self.cfg.rollout.env_timeout_s
        if pulse.doing.get(ENVIRONMENTS, 0.0) > limit:
            self.hung += 1
            self.drop(slot, f"was cut off: {pulse.note} hung for {limit:g} s (rollout.env_timeout_s)")

    def note(self, slot: Slot, report: RolloutReport) -> None:
        self.totals[report.incarnation], self.acknowledged[report.incarnation] = report.total, report.stored
        self.snapshots[report.incarnation] = report.timing
        self.returns += report.returns
        self.incidents += [f"{slot.name}: {fault}; the environment was made anew" for fault in report.faults]
        crashed = sum(fault.crashed for fault in report.faults)
        self.crashed, self.bad = self.crashed + crashed, self.bad + len(report.faults) - crashed
        slot.deaths = 0

    def drop(self, slot: Slot, why: str) -> None:
        """Forget a worker (what it sent and the replay has is safe) and ask for another one, later each time that none comes to work."""
        ready = slot.member is not None
        ray.kill(slot.actor)                                                        # also a stopped process, which Ray kills after 5 s
        if ready:                                                                   # should it come to itself before, what it sends is refused
            self.retiring += [ray.get_actor(name).retire.remote(slot.member.incarnation) for name in self.replays]
        if ready and slot.member.incarnation in self.snapshots:
            put_by(self.snapshots, self.snapshots.pop(slot.member.incarnation))
        slot.actor = slot.hello = slot.member = slot.heart = slot.pulse = None
        slot.calls, slot.deaths, self.lost = {}, slot.deaths + 1, self.lost + ready
        slot.fill_at = time.monotonic() + (min(BACK_OFF_S, 2.0 ** min(slot.deaths - 2, 9)) if slot.deaths > 1 else 0.0)
        if ready or slot.deaths > QUIET_DEATHS:
            self.incidents.append(f"{slot.name} {why}{'' if ready else ' before it was ready'}; a new one is asked for, {len(self.members)} there")
        if slot.deaths >= HOPELESS and not self.members:
            raise RunError(f"{slot.name} {why}: {slot.deaths} times in a row, without a step between, and no other worker is there. "
                           "Look at the memory of its node and at the environment; the same command resumes from the last checkpoint")

    def idle(self) -> bool:
        return not any(slot.calls for slot in self.slots)

    def flush(self) -> None:
        """Open segments of all workers into the replay."""
        calls = {slot.actor.flush.remote(): (slot, slot.actor) for slot in self.members}
        ready = self.supervisor.wait(list(calls), self.cfg.resources.call_timeout_s, len(calls), patient=True) if calls else []
        for ref, (slot, actor) in calls.items():
            if slot.actor is not actor:                                             # dropped meanwhile
                continue
            try:
                if ref not in ready:
                    self.drop(slot, f"did not send its last segments within {self.cfg.resources.call_timeout_s:g} s (resources.call_timeout_s)")
                else:
                    self.note(slot, ray.get(ref))
            except RayTaskError as error:
                raise_cause(error, slot.name)
            except RayError as error:
                self.drop(slot, f"was lost while it sent its last segments ({type(error).__name__})")

    def stored(self, env_steps: int) -> None:
        """After a flush: whatever was executed and is not stored was lost with a worker."""
        self.before = env_steps - sum(self.totals.values())

    def gauges(self) -> dict[str, float]:
        return {"rollout/workers": float(len(self.members)), "rollout/nodes": float(len({slot.member.node for slot in self.members})),
                "rollout/waiting": float(len(self.slots) - len(self.members)), "rollout/joined": float(self.joined), "rollout/lost": float(self.lost),
                "rollout/env_crashed": float(self.crashed), "rollout/env_hung": float(self.hung), "rollout/env_bad": float(self.bad),
                "rollout/acknowledged": float(sum(self.acknowledged.values()))}

    def close(self) -> None:
        for slot in self.slots:
            if slot.actor is not None:
                ray.kill(slot.actor)
        self.slots = []
        self.supervisor.workers = no_pulses
