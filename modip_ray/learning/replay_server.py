"""The replay role: stores segments, hands out batches with the right mix, counts both against the rate limiter. Plain object, no torch, no Ray."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError

from modip_ray.config import Config
from modip_ray.learning.checkpoint import Checkpoint, as_bytes
from modip_ray.learning.journal import Journal, Record
from modip_ray.learning.limiter import STREAMS, RateLimiter, Stream
from modip_ray.learning.replay import Batch, MixedReplay, ReplayBuffer
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

    def __init__(self, cfg: Config, replay: MixedReplay, journal: Journal | None = None):
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
            return self.replay.sequences(cfg.world_model.batch_size, cfg.world_model.horizon, n_step, share)
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
        newest = (online.head - 1 - np.arange(min(RECENT, online.size))) % online.capacity
        gain = online.arrays["gain"][newest]
        gain = gain[np.isfinite(gain)]
        if not len(gain):
            return {}
        return {"plan_gain_mean": float(gain.mean()), "plan_share_accepted": float((gain > self.cfg.guard.min_gain).mean())}

    def state(self) -> Batch:
        """Online contents, ids and counts for a checkpoint; the journal goes on in a new part, where what comes later is found."""
        online = {f"online.{k}": v for k, v in self.replay.online.state().items()}
        facts = {"inserted": self.limiter.inserted, "journal": self.journal.rotate() if self.journal is not None else 0,
                 "seen": self.replay.seen.dump(), "retired": sorted(self.retired)}
        return online | {"facts": as_bytes(json.dumps(facts))}

    def sync(self) -> None:
        """Have what was stored before the last `state` on the disk itself; may be called beside the rest."""
        if self.journal is not None:
            self.journal.sync()

    def load_state(self, state: Batch, updates: int, policy_updates: int) -> int:
        """Inverse of `state`; the updates are those of the learner's own checkpoint. Returns the journal's part to `recover` from."""
        self.replay.online.load_state({k.removeprefix("online."): v for k, v in state.items() if k.startswith("online.")})
        facts = json.loads(state["facts"].tobytes())
        self.replay.seen, self.retired = SeenIds.parse(facts["seen"]), set(facts["retired"])
        self.limiter.set_counts(facts["inserted"], updates, policy_updates)
        return facts["journal"]


def offline_replay(cfg: Config, episodes: Sequence[Episode]) -> ReplayBuffer:
    first = episodes[0]
    offline = ReplayBuffer(sum(e.length for e in episodes), first.observations.shape[1], first.actions.shape[1], cfg.critic.gamma)
    for episode in episodes:
        offline.add(Segment.from_episode(episode))
    return offline


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


def build_replay(cfg: Config, episodes: Sequence[Episode], journal: Journal | None = None) -> ReplayServer:
    """Offline data beside an empty online ring that can hold the whole run, or replay.capacity."""
    offline = offline_replay(cfg, episodes)
    obs_dim, action_dim = offline.arrays["obs"].shape[1], offline.arrays["action"].shape[1]
    online = ReplayBuffer(cfg.replay.capacity, obs_dim, action_dim, cfg.critic.gamma, cfg.planner.horizon)
    return ReplayServer(cfg, MixedReplay(offline, online, cfg.seed, cfg.distill.target == "planned"), journal)


def shard_updates(state: Mapping[str, np.ndarray], shards: int) -> np.ndarray:
    """How many of a learner's updates, by its checkpoint part, took their batch from each shard (n,)."""
    return state["shard_updates"] if shards > 1 else state["updates"].reshape(1)


def restored_replay(cfg: Config, episodes: Sequence[Episode], checkpoint: Checkpoint | None, run: Path | None, shard: int = 0,
                    exact: bool = False) -> ReplayServer:
    """A shard of the replay as it was: from the checkpoint, and from the journal in the run's folder (None: there is no journal).

    exact: as it was at the checkpoint, without what was stored since, which the journal forgets.
    """
    name, first = shard_name(cfg, shard), 0
    server = build_replay(shard_config(cfg, shard), episodes, Journal(run / "journal" / name) if run is not None else None)
    if checkpoint is not None:
        updates = [int(shard_updates(checkpoint.read(f"learner_{stream}"), cfg.replay.shards)[shard]) for stream in STREAMS]
        first = server.load_state(checkpoint.read(name), *updates)
    if server.journal is not None:
        if exact:
            server.journal.drop(since=first)
        server.recover(first)
    return server
