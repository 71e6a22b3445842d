"""What rollout workers send to the replay: consecutive steps of one episode; and the record of which were received."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import numpy as np
from safetensors.numpy import load, save

from modip_ray.tasks.episode import Episode


@dataclass(frozen=True)
class Segment:
    """Consecutive transitions of one episode, with what was planned at each step."""

    observations: np.ndarray   # (T+1, Do) the last row is the true observation after the last action
    actions: np.ndarray        # (T, Da) environment units
    rewards: np.ndarray        # (T,)
    terminated: bool           # the last step ended the episode for real; False: time limit, or the episode goes on in a later segment
    plans: np.ndarray | None = None   # (T, H, Da) planned sequences
    gains: np.ndarray | None = None   # (T,) predicted gain of each plan over the policy's own proposals (NaN where nothing was planned)
    id: str = ""               # worker/incarnation/number: a segment sent twice is stored once; one of replay.shards has numbers of its own

    @staticmethod
    def from_episode(episode: Episode) -> Segment:
        return Segment(episode.observations, episode.actions, episode.rewards, episode.terminated)

    @property
    def incarnation(self) -> str:
        """Of the worker that made it, by the id "worker/incarnation.group.shard/number"; "" where the id has none."""
        parts = self.id.split("/")
        return parts[1].partition(".")[0] if len(parts) == 3 else ""

    def __len__(self) -> int:
        return len(self.rewards)


ARRAYS = ("observations", "actions", "rewards", "plans", "gains")


def encode(segment: Segment) -> bytes:
    """A segment as safetensors: its arrays in float32, `terminated` and the id (utf-8) as bytes."""
    arrays = {k: np.ascontiguousarray(v, np.float32) for k in ARRAYS if (v := getattr(segment, k)) is not None}
    return save(arrays | {"terminated": np.array([segment.terminated], np.uint8), "id": np.frombuffer(segment.id.encode(), np.uint8)})


def decode(data: bytes) -> Segment:
    """Inverse of `encode`."""
    arrays = load(data)
    return Segment(terminated=bool(arrays.pop("terminated")[0]), id=arrays.pop("id").tobytes().decode(), **arrays)


@dataclass
class SeenIds:
    """Ids that were stored. A sender counts its segments from 0, for each shard, so a number for each sender, and the few that came out of turn, say it all."""

    below: dict[str, int] = field(default_factory=dict)             # by sender ("worker/incarnation"): all numbers below this one were seen
    early: dict[str, set[int]] = field(default_factory=dict)        # and these beyond it

    @staticmethod
    def split(name: str) -> tuple[str, int]:
        """Sender and number; an id that ends in no number is a sender of one segment."""
        sender, _, number = name.rpartition("/")
        return (sender, int(number)) if number.isdecimal() else (f"{name}/", 0)

    def __contains__(self, name: str) -> bool:
        sender, number = self.split(name)
        return number < self.below.get(sender, 0) or number in self.early.get(sender, ())

    def add(self, name: str) -> None:
        sender, number = self.split(name)
        early, below = self.early.setdefault(sender, set()), self.below.get(sender, 0)
        early.add(number)
        while below in early:
            early.remove(below)
            below += 1
        self.below[sender] = below
        if not early:
            del self.early[sender]

    def __len__(self) -> int:
        return sum(self.below.values()) + sum(map(len, self.early.values()))

    def dump(self) -> str:
        return json.dumps({sender: [below, *sorted(self.early.get(sender, ()))] for sender, below in self.below.items()})

    @staticmethod
    def parse(text: str) -> SeenIds:
        found = json.loads(text)
        return SeenIds({sender: below for sender, (below, *_) in found.items()}, {sender: set(early) for sender, (_, *early) in found.items() if early})
