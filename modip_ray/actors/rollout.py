"""The rollout role: groups of environments in a process without torch, driven by the planner, feeding the replay."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayError, RayTaskError

from modip_ray.actors.channel import Connection
from modip_ray.actors.pulse import GROUP, PULSE, Life, Pulse
from modip_ray.config import Config
from modip_ray.learning.collector import Collector, Planned, Query, SegmentHook
from modip_ray.learning.segment import Segment
from modip_ray.runfolder import RunError
from modip_ray.tasks.envs import EnvError, EnvFactory
from modip_ray.timing import Timer

MAX_UNACKNOWLEDGED = 2
ASK_AGAIN_S = 0.5
ENVIRONMENTS = "environments"       # the timer's name for a step of a group


class Hello(NamedTuple):
    """A worker that is ready says who and where it is."""

    incarnation: str
    node: str


class RolloutReport(NamedTuple):
    incarnation: str
    total: int                      # environment steps executed by this incarnation
    stored: int                     # transitions of it that the replay has acknowledged
    returns: list[float]            # of episodes that ended since the last report
    faults: list[EnvError]          # of environments that were made anew since then
    timing: dict[str, Any]


class Group:
    """Environments that are stepped together, their line to the planner, and whether a plan is on its way."""

    def __init__(self, collector: Collector, client: tuple[int, int]):
        self.collector, self.client = collector, client
        self.line: Connection | None = None
        self.asked = False
        self.numbers: Counter[int] = Counter()                                      # segments sent, by shard

    def renamed(self, segments: list[Segment], shard: int) -> list[Segment]:
        """The same, numbered from 0 for each shard: where numbers of a sender are left out, a shard has to remember every single one (`SeenIds`)."""
        first, self.numbers[shard] = self.numbers[shard], self.numbers[shard] + len(segments)
        return [replace(segment, id=f"{self.collector.name}.s{shard}/{first + k}") for k, segment in enumerate(segments)]


@ray.remote(max_restarts=0, max_task_retries=0, concurrency_groups=GROUP)
class RolloutWorker:
    """Holds nothing that matters: one that is gone is replaced (actors/pool.py) by a new incarnation with new episodes.

    While the planner plans for one group of environments, another is stepped (rollout.groups).
    """

    def __init__(self, cfg: Config, env_factory: EnvFactory, hook: SegmentHook | None, slot: int, planner: str, replays: Sequence[str], key: bytes,
                 audit: Path | None = None):
        """replays: its shards, which take an equal share each. audit: folder where it keeps a record of what they have answered for; see `log.audit`."""
        self.cfg, self.env_factory, self.hook, self.slot, self.names, self.timer = cfg, env_factory, hook, slot, (planner, replays), Timer()
        self.key = key
        self.life = Life(self.timer)
        self.incarnation = self.life.incarnation
        self.acks: deque[tuple[ray.ObjectRef, Any, list[Segment]]] = deque()         # answers to come, from which shard, to what
        self.record = open(audit / self.incarnation, "ab", buffering=0) if audit is not None else None
        self.total, self.stored, self.turn, self.sent = 0, 0, 0, slot
        self.returns: list[float] = []

    @ray.method(**PULSE)
    def pulse(self) -> Pulse:
        """Notes which environment is at work."""
        busy = [group.collector.group.busy for group in self.groups]
        return self.life.pulse()._replace(note=", ".join(f"env {i} of group {g}" for g, i in enumerate(busy) if i is not None))

    def hello(self) -> Hello:
        """Build the environments; what they raise reaches the driver as it is."""
        cfg, n = self.cfg, self.cfg.rollout.groups
        self.planner, self.replays = ray.get_actor(self.names[0]), [ray.get_actor(name) for name in self.names[1]]
        self.groups = []
        for g in range(n):
            name, seed = f"{self.incarnation}.{g}" if g else self.incarnation, (cfg.seed, self.slot + 1, int(self.incarnation, 16), *([g] if g else []))
            collector = Collector(self.env_factory, cfg.rollout.envs_per_worker // n, cfg.task.max_episode_steps, cfg.rollout.segment_length, seed,
                                  f"{self.slot}/{name}", self.hook, cfg.rollout.max_env_failures)
            self.groups.append(Group(collector, (self.slot, g)))
        return Hello(self.incarnation, ray.get_runtime_context().get_node_id())

    def modules(self) -> list[str]:
        """The top-level packages that this process has imported (a test looks for torch)."""
        import sys
        return sorted({name.partition(".")[0] for name in sys.modules})

    def run(self, steps: int, seconds: float) -> RolloutReport:
        """Collect so many environment steps (to the end of a group step), or for so many seconds. Plans that are on their way stay so between calls."""
        deadline, before = time.monotonic() + seconds, self.total
        while self.total - before < steps and time.monotonic() < deadline:
            if not self.acknowledged(MAX_UNACKNOWLEDGED - 1, deadline):
                break
            for group in self.groups:
                if not group.asked:
                    self.ask(group)
            group, self.turn = self.groups[self.turn], (self.turn + 1) % len(self.groups)
            planned = self.answer(group)
            with self.timer(ENVIRONMENTS):
                self.total += group.collector.execute(planned)
            self.ask(group)                                                         # before the segments: the planner works meanwhile
            self.send(group, group.collector.take_segments())
        return self.report()

    def flush(self) -> RolloutReport:
        """Send the open segments too, and wait until everything is stored."""
        for group in self.groups:
            self.send(group, group.collector.take_segments(flush=True))
        while self.acks:
            self.take_ack()
        return self.report()

    def send(self, group: Group, segments: list[Segment]) -> None:
        self.returns += [episode.ret for episode in group.collector.take_episodes()]
        if segments:
            i, self.sent = self.sent % len(self.replays), self.sent + 1
            segments, shard = segments if len(self.replays) == 1 else group.renamed(segments, i), self.replays[i]
            self.acks.append((shard.add.remote(segments), shard, segments))

    def take_ack(self) -> Any:
        """The oldest sending is stored; the shard that collection is to wait for, if it is to."""
        ref, shard, segments = self.acks.popleft()
        ack = self.get(ref)
        self.stored += sum(map(len, segments))
        if self.record is not None and segments:
            self.record.write(b"".join(f"{segment.id}\n".encode() for segment in segments))
        return None if ack.may_collect else shard

    def acknowledged(self, unanswered: int, deadline: float) -> bool:
        """Wait until at most `unanswered` sendings are; and, where the replay says so, for collection's turn. False when time is over."""
        with self.timer("wait/learning"):
            while len(self.acks) > unanswered:
                if (shard := self.take_ack()) is not None:
                    self.acks.append((shard.turn.remote(), shard, []))
                    if time.monotonic() >= deadline:
                        break
        return len(self.acks) <= unanswered

    def ask(self, group: Group) -> None:
        """Send the group's query; where that fails, `answer` will notice."""
        group.asked = True
        try:
            if group.line is None:
                group.line = Connection(self.get(self.planner.address.remote()), self.key, self.cfg.resources.call_timeout_s)
            group.line.send(Query(group.client, self.incarnation, group.collector.obs, group.collector.reset))
        except OSError:
            self.hang_up(group)
        except RayTaskError:
            raise
        except RayError:
            self.hang_up(group)

    def answer(self, group: Group) -> Planned:
        """The group's plan. A planner that died is restarted by Ray, at a new address: ask again; one that is away for too long is an error."""
        limit = self.cfg.resources.patience_s
        deadline = time.monotonic() + limit
        with self.timer("wait/planner"):
            while time.monotonic() < deadline:
                try:
                    if group.line is not None:
                        planned, group.asked = group.line.receive(len(group.collector.obs)), False
                        return planned
                except OSError:
                    self.hang_up(group)
                time.sleep(ASK_AGAIN_S)
                self.ask(group)
        raise RunError(f"the planner did not answer within {limit:g} s (resources.call_timeout_s + resources.restart_s)")

    def hang_up(self, group: Group) -> None:
        if group.line is not None:
            group.line.close()
            group.line = None

    def report(self) -> RolloutReport:
        returns, self.returns = self.returns, []
        faults = [fault for group in self.groups for fault in group.collector.take_faults()]
        return RolloutReport(self.incarnation, self.total, self.stored, returns, faults, self.timer.snapshot())

    def get(self, ref: ray.ObjectRef) -> Any:
        return ray.get(ref, timeout=self.cfg.resources.patience_s)

