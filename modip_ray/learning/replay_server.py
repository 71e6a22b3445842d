"""The replay role: stores segments, hands out batches with the right mix, counts both against the rate limiter. Plain object, no torch, no Ray."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

import numpy as np

from modip_ray.config import Config
from modip_ray.learning.limiter import STREAMS, RateLimiter, Stream
from modip_ray.learning.replay import Batch, MixedReplay, ReplayBuffer, Segment
from modip_ray.schedule import widened
from modip_ray.tasks.episode import Episode

RECENT = 4000                       # online transitions behind the planner's statistics


class ReplayServer:
    """Each update stream draws with its own generator, so the batches of one do not depend on when the other one asks."""

    def __init__(self, cfg: Config, replay: MixedReplay):
        self.cfg, self.replay, self.limiter = cfg, replay, RateLimiter(cfg)
        self.rngs: dict[Stream, np.random.Generator] = {s: np.random.default_rng([cfg.seed, i]) for i, s in enumerate(STREAMS)}

    @property
    def env_steps(self) -> int:
        """Online transitions stored so far (those that the ring has dropped again included)."""
        return self.limiter.inserted

    def add(self, segments: Iterable[Segment]) -> int:
        """Store segments whose id is new; returns the transitions stored. ValueError names a segment that is not what it should be."""
        stored = 0
        for segment in segments:
            if self.replay.add(segment):
                stored += len(segment)
        self.limiter.insert(stored)
        return stored

    def share(self, start: float, end: float) -> float:
        """Online share of a batch: linear from start to end over the online phase."""
        return widened(start, end, self.env_steps / max(self.cfg.online.env_steps, 1))

    def sample(self, stream: Stream) -> Batch:
        """The next batch of a stream, counted as granted; ask `limiter.may_sample` first."""
        cfg = self.cfg
        online = self.limiter.is_online(stream, self.limiter.grant(stream))
        n_step = cfg.critic.n_step if online else cfg.critic.pretrain_n_step
        self.replay.rng = self.rngs[stream]
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
        """Online contents, generators and counts for a checkpoint."""
        rngs = {s: rng.bit_generator.state for s, rng in self.rngs.items()}
        online = {f"online.{k}": v for k, v in self.replay.online.state().items()}
        return {**online, "rngs": np.array(json.dumps(rngs)), "inserted": np.array(self.limiter.inserted)}

    def load_state(self, state: Batch, updates: int, policy_updates: int) -> None:
        """Inverse of `state`; the updates are those of the learner's own checkpoint."""
        self.replay.online.load_state({k.removeprefix("online."): v for k, v in state.items() if k.startswith("online.")})
        for stream, rng_state in json.loads(str(state["rngs"])).items():
            self.rngs[stream].bit_generator.state = rng_state
        self.limiter.set_counts(int(state["inserted"]), updates, policy_updates)


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


def build_replay(cfg: Config, episodes: Sequence[Episode]) -> ReplayServer:
    """Offline data beside an empty online ring that can hold the whole run, or replay.capacity."""
    offline = offline_replay(cfg, episodes)
    obs_dim, action_dim = offline.arrays["obs"].shape[1], offline.arrays["action"].shape[1]
    online = ReplayBuffer(cfg.replay.capacity, obs_dim, action_dim, cfg.critic.gamma, cfg.planner.horizon)
    return ReplayServer(cfg, MixedReplay(offline, online, cfg.seed, cfg.distill.target == "planned"))
