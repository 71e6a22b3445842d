"""Samples per insert: learning may not run ahead of collection, nor collection far ahead of learning. Counts only; who waits is told why."""

from __future__ import annotations

from typing import Literal

from modip_ray.config import Config

Stream = Literal["model", "policy"]
STREAMS: tuple[Stream, ...] = ("model", "policy")

LEARNING_WAITS = "wait/collection"      # learning has used up what collection allows
COLLECTION_WAITS = "wait/learning"      # collection is too far ahead of learning


def offline_updates(cfg: Config) -> dict[Stream, int]:
    """Updates of each stream before its online ones."""
    return {"model": cfg.pretrain.updates, "policy": cfg.pretrain.policy_updates}


def updates_per_step(cfg: Config) -> dict[Stream, float]:
    """Online updates of each stream for an environment step."""
    rate = cfg.online.updates_per_step
    return {"model": rate, "policy": rate * cfg.policy.updates_per_update}


class RateLimiter:
    """Updates allowed = offline updates + updates per step * inserted environment steps, for each of the two update streams.

    No online update before online.min_online steps are there. Collection stops while it is more than replay.samples_per_insert_slack steps ahead of the slower
    stream and there is something to learn from them.
    """

    def __init__(self, cfg: Config):
        self.offline, self.rate = offline_updates(cfg), updates_per_step(cfg)
        self.min_online = min(cfg.online.min_online, cfg.online.env_steps)
        self.slack = cfg.replay.samples_per_insert_slack
        self.inserted = 0
        self.granted: dict[Stream, int] = {"model": 0, "policy": 0}

    def insert(self, steps: int) -> None:
        self.inserted += steps

    def allowed(self, stream: Stream) -> int:
        """Updates of a stream that may have been made by now."""
        usable = self.inserted if self.inserted >= self.min_online else 0
        return self.offline[stream] + int(self.rate[stream] * usable + 1e-9)

    def may_sample(self, stream: Stream, update: int | None = None) -> bool:
        """Whether an update (0, 1, ...; None: the next one) may be made now."""
        return (self.granted[stream] if update is None else update) < self.allowed(stream)

    def note(self, stream: Stream, updates: int) -> None:
        """A learner has had the batches of so many updates. A replay that comes back from an older state learns here how far learning is."""
        self.granted[stream] = max(self.granted[stream], updates)

    def is_online(self, stream: Stream, update: int) -> bool:
        return update >= self.offline[stream]

    def ahead(self) -> float:
        """Environment steps that the slower stream has not made its updates for."""
        behind = [self.inserted - max(self.granted[s] - self.offline[s], 0) / self.rate[s] for s in STREAMS if self.rate[s] > 0]
        return max(behind, default=0.0)

    def may_collect(self) -> bool:
        return self.inserted < self.min_online or self.ahead() <= self.slack or not any(self.may_sample(s) for s in STREAMS)

    def set_counts(self, inserted: int, model: int, policy: int) -> None:
        """On resume: what was inserted, and the updates really made (batches on their way when the run stopped do not count)."""
        self.inserted, self.granted = inserted, {"model": model, "policy": policy}
