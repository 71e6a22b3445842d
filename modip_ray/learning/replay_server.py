"""The replay role: stores segments, hands out batches with the right mix, counts both against the rate limiter. Plain object, no torch, no Ray."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from modip_ray.config import Config, ConfigError
from modip_ray.learning.checkpoint import Checkpoint, CheckpointError, as_bytes, folders, write_state
from modip_ray.learning.journal import Journal, Record
from modip_ray.learning.limiter import STREAMS, RateLimiter, Stream
from modip_ray.learning.offline_rows import in_memory, mapped
from modip_ray.learning.replay import Batch, MixedReplay, ReplayBuffer
from modip_ray.learning.replay_files import ReplayFiles, Snapshot
from modip_ray.learning.segment import SeenIds, Segment, decode, encode
from modip_ray.schedule import widened
from modip_ray.tasks.episode import Episode

RECENT = 4000                       # online transitions behind the planner's statistics


SEGMENT, RETIRED = 1, 2             # kinds of journal records


class Refused(RuntimeError):
    """Segments of a worker incarnation that was given up."""


class ReplayServer:
    """What `add` has answered for is in the journal, if there is one, and outlives the process.

    A batch depends on what is stored and on the number of the update it is for, on nothing else: asked for twice it is drawn alike.
    """

    def __init__(self, cfg: Config, replay: MixedReplay, journal: Journal | None = None, component: str = "replay"):
        """component: the name of this role's files in checkpoints."""
        import modip_ray.learning.gather  # noqa: F401  compiled, or loaded, before the first batch is asked for
        self.files = ReplayFiles(component)
        self.cfg, self.replay, self.journal, self.limiter = cfg, replay, journal, RateLimiter(cfg)
        self.retired: set[str] = set()                              # incarnations of workers that were given up
        self.refused, self.damaged = 0, 0                           # segments that came from them; places of the journal that could not be read

    @property
    def env_steps(self) -> int:
        """Online transitions stored so far (those that the ring has dropped again included)."""
        return self.limiter.inserted

    def add(self, segments: Sequence[Segment]) -> int:
        """Store segments whose id is new: first in the journal, then in the ring; returns the transitions stored.

        ValueError names a segment that is not what it should be, JournalError a disk that does not take it, Refused a sender that was given up.
        Then none is stored.
        """
        new = {segment.id or i: segment for i, segment in enumerate(segments) if segment.id not in self.replay.seen}
        given_up = sorted({segment.incarnation for segment in new.values()} & self.retired)
        if given_up:
            self.refused += len(new)
            raise Refused(f"rollout worker incarnation {', '.join(given_up)} was given up: its segments are not stored any more")
        for segment in new.values():
            self.replay.online.check(segment)
        if self.journal is not None and new:
            self.journal.append([Record(SEGMENT, encode(segment)) for segment in new.values()])
        return sum(map(self.store, new.values()))

    def store(self, segment: Segment) -> int:
        """Into the ring, unless its id was stored before; returns the transitions stored."""
        stored = len(segment) if self.replay.add(segment) else 0
        self.limiter.insert(stored)
        return stored

    def retire(self, incarnation: str) -> None:
        """Refuse what a worker incarnation sends from now on. What it has stored stays."""
        if incarnation not in self.retired:
            if self.journal is not None:
                self.journal.append([Record(RETIRED, incarnation.encode())])
            self.retired.add(incarnation)

    def recover(self, first: int) -> int:
        """Take over what the journal holds since part `first`; returns the transitions stored. What cannot be read is named on stderr."""
        stored, problems = 0, self.journal.damage
        for kind, payload in self.journal.read(first):
            try:
                if kind == RETIRED:
                    self.retired.add(payload.decode())
                else:
                    stored += self.store(decode(payload))
            except (ValueError, KeyError, TypeError, SafetensorError) as error:
                problems.append(f"{self.journal.folder}: a record cannot be used: {error}")
        self.damaged = len(problems)
        for problem in problems:
            print(f"modip: damaged journal: {problem}", file=sys.stderr)
        return stored

    def share(self, start: float, end: float) -> float:
        """Online share of a batch: linear from start to end over the online phase."""
        return widened(start, end, self.env_steps / max(self.cfg.online.env_steps, 1))

    def sample(self, stream: Stream, update: int | None = None) -> Batch:
        """The batch of an update (0, 1, ...; None: the next one), counted as handed out; ask `limiter.may_sample` first."""
        cfg, update = self.cfg, self.limiter.granted[stream] if update is None else update
        self.limiter.note(stream, update + 1)
        online = self.limiter.is_online(stream, update)
        n_step = cfg.critic.n_step if online else cfg.critic.pretrain_n_step
        self.replay.rng = np.random.default_rng([cfg.seed, STREAMS.index(stream), update])
        if stream == "model":
            share = self.share(cfg.online.online_share_start, cfg.online.online_share_end) if online else 0.0
            rows = cfg.world_model.batch_size * cfg.critic.updates_per_update
            return self.replay.sequences(rows, cfg.world_model.horizon, n_step, share, cfg.critic.td_lambda)
        share = self.share(cfg.distill.online_share_start, cfg.distill.online_share_end) if online else 0.0
        return self.replay.chunks(cfg.policy.batch_size, cfg.policy.horizon, cfg.distill.n_step, share)

    def diagnostic_batch(self, rows: int, horizon: int, seed: int) -> Batch:
        """Sequences with a generator of their own (training does not notice): of online data where there is enough of it, else offline."""
        source = self.replay.online if self.replay.online.size >= rows else self.replay.offline
        return source.sequences(source.draw(np.random.default_rng(seed), rows), horizon, n_step=10_000)

    def plan_statistics(self) -> dict[str, float]:
        """Of the newest online transitions: the plans' mean predicted gain, and the share that the planner acted on (the guard let it)."""
        online = self.replay.online
        if not online.size:
            return {}
        gain = online.arrays["gain"][online.newest(min(RECENT, online.size))]
        gain = gain[np.isfinite(gain)]
        if not len(gain):
            return {}
        return {"plan_gain_mean": float(gain.mean()), "plan_share_accepted": float((gain > self.cfg.guard.min_gain).mean())}

    # ---- checkpoints -------------------------------------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> int:
        """This role's part of a checkpoint, into a folder from `begin`; returns the environment steps in it."""
        return self.write(folder, self.snapshot(self.files.sound(folder.parent)))

    def snapshot(self, sound: Mapping[str, Path]) -> tuple[Snapshot, dict[str, Any]]:
        """What `write` needs, of one moment; `sound`: of `files.sound`. The journal goes on in a new part, where what comes later will be found."""
        online = self.replay.online
        facts = {"size": online.size, "total": online.total, "inserted": self.limiter.inserted, "seen": self.replay.seen.dump(),
                 "retired": sorted(self.retired), "journal": self.journal.rotate() if self.journal is not None else 0}
        return self.files.snapshot(online, sound), facts

    def write(self, folder: Path, snapshot: tuple[Snapshot, dict[str, Any]]) -> int:
        """May be called beside everything but `write`. Parts of the journal that no checkpoint needs any more are deleted."""
        ring, facts = snapshot
        sums = self.files.write(folder, ring)
        write_state(folder, self.files.component, {"facts": as_bytes(json.dumps(facts | {"sums": sums}))})
        if self.journal is not None:
            self.journal.sync()
            needed = [part for kept in folders(folder.parent)[:self.cfg.log.keep_checkpoints] if (part := self.journal_part(kept)) is not None]
            self.journal.drop(before=min(needed, default=0))
        return facts["inserted"]

    def journal_part(self, folder: Path) -> int | None:
        """From which part on the journal has what a checkpoint has not; None for one that cannot be read."""
        try:
            return facts_of(Checkpoint(folder, {}), self.files.component)["journal"]
        except CheckpointError:
            return None

    def load(self, checkpoint: Checkpoint, updates: int, policy_updates: int) -> int:
        """Take over what `save` wrote; the updates are those of the learners' own parts. Returns the part of the journal to `recover` from."""
        facts = facts_of(checkpoint, self.files.component)
        self.files.load(self.replay.online, checkpoint, facts["size"], facts["total"], facts["sums"])
        self.replay.seen, self.retired = SeenIds.parse(facts["seen"]), set(facts["retired"])
        self.limiter.set_counts(facts["inserted"], updates, policy_updates)
        return facts["journal"]


def facts_of(checkpoint: Checkpoint, component: str) -> dict[str, Any]:
    state = checkpoint.read(component)
    try:
        return json.loads(state["facts"].tobytes())
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{checkpoint.path}: {component} is not what this version of modip_ray writes; start in another run_dir, or go on with the "
                              "version that wrote it") from error


def offline_replay(cfg: Config, data: Sequence[Episode | Path]) -> ReplayBuffer:
    """Offline data of one shard: its episodes, or the one file that `write_rows` made of them."""
    return mapped(data[0], cfg.critic.gamma) if isinstance(data[0], Path) else in_memory(data, cfg.critic.gamma)


def part(total: int, shards: int, shard: int) -> int:
    """A shard's share of a number; the first ones take what does not divide."""
    return total // shards + (shard < total % shards)


def shard_config(cfg: Config, shard: int) -> Config:
    """The settings by which one of replay.shards works: its share of data, updates and steps, and a seed of its own. One shard: as they are."""
    n = cfg.replay.shards
    if n == 1:
        return cfg
    shares = {"replay.capacity": cfg.replay.capacity, "online.env_steps": cfg.online.env_steps, "online.min_online": cfg.online.min_online,
              "pretrain.updates": cfg.pretrain.updates, "pretrain.policy_updates": cfg.pretrain.policy_updates}
    return cfg.replace({k: part(v, n, shard) for k, v in shares.items()}
                       | {"replay.shards": 1, "replay.samples_per_insert_slack": cfg.replay.samples_per_insert_slack / n, "seed": cfg.seed + shard})


def shard_name(cfg: Config, shard: int) -> str:
    """A shard's checkpoint component."""
    return "replay" if cfg.replay.shards == 1 else f"replay_{shard}"


def build_replay(cfg: Config, data: Sequence[Episode | Path], journal: Journal | None = None, component: str = "replay") -> ReplayServer:
    """Offline data beside an empty online ring that can hold the whole run, or replay.capacity."""
    offline = offline_replay(cfg, data)
    obs_dim, action_dim = offline.arrays["obs"].shape[1], offline.arrays["action"].shape[1]
    try:
        online = ReplayBuffer(cfg.replay.capacity, obs_dim, action_dim, cfg.critic.gamma, cfg.planner.horizon)
    except MemoryError as error:
        raise ConfigError(f"replay.capacity: got {cfg.replay.capacity}, which this machine has not the memory for ({error})") from error
    return ReplayServer(cfg, MixedReplay(offline, online, cfg.seed, cfg.distill.target == "planned"), journal, component)


def shard_updates(state: Mapping[str, np.ndarray], shards: int) -> np.ndarray:
    """How many of a learner's updates, by its checkpoint part, took their batch from each shard (n,)."""
    return state["shard_updates"] if shards > 1 else state["updates"].reshape(1)


def restored_replay(cfg: Config, data: Sequence[Episode | Path], checkpoint: Checkpoint | None, run: Path | None, shard: int = 0,
                    exact: bool = False) -> ReplayServer:
    """A shard of the replay as it was: from the checkpoint, and from the journal in the run's folder (None: there is no journal).

    exact: as it was at the checkpoint, without what was stored since, which the journal forgets.
    """
    name, first = shard_name(cfg, shard), 0
    server = build_replay(shard_config(cfg, shard), data, Journal(run / "journal" / name) if run is not None else None, name)
    if checkpoint is not None:
        updates = [int(shard_updates(checkpoint.read(f"learner_{stream}"), cfg.replay.shards)[shard]) for stream in STREAMS]
        if checkpoint.has(name):
            first = server.load(checkpoint, *updates)
        else:                                                                       # the pre-training of another run (start.py)
            server.limiter.set_counts(0, *updates)
    if server.journal is not None:
        if exact:
            server.journal.drop(since=first)
        server.recover(first)
    return server
