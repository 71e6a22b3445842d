"""Replay of segments: a preallocated ring of transitions whose sequences never cross a segment's end.

A segment is a run of consecutive transitions of one episode. Every stored transition can start a sequence; a sequence that reaches its
segment's end is padded and masked. n-step returns come from a discounted suffix sum kept per transition, so any n costs the same.
Symbols: B rows, H horizon, Do / Da sizes.
"""

from __future__ import annotations

import numpy as np

from modip_ray.learning.segment import SeenIds, Segment

Batch = dict[str, np.ndarray]


def discounted_suffix(rewards: np.ndarray, gamma: float) -> np.ndarray:
    """G (T+1,) float64 with G_t = r_t + gamma * G_{t+1} and G_T = 0."""
    out = np.zeros(len(rewards) + 1)
    for t in range(len(rewards) - 1, -1, -1):
        out[t] = rewards[t] + gamma * out[t + 1]
    return out


class ReplayBuffer:
    """A ring over `capacity` transitions. Not thread-safe: its owner calls it from one place.

    A transition is one row of numbers, so a sequence lies in one piece of memory and is gathered at once. What comes after a transition is the next
    record's observation; only the last observation of a segment is kept apart, by the position of the segment's end.
    """

    def __init__(self, capacity: int, obs_dim: int, action_dim: int, gamma: float, plan_horizon: int = 0):
        self.capacity, self.gamma, self.plan_horizon = capacity, gamma, plan_horizon
        self.size, self.head, self.total = 0, 0, 0
        widths = {"obs": obs_dim, "action": action_dim, "reward": 1,
                  "suffix": 1,                                 # discounted return to the segment's end
                  "gain": 1,
                  "remaining": 1,                              # transitions from here to the segment's end, this one included
                  "terminated": 1,                             # the *segment* ends in a real termination
                  "plan": plan_horizon * action_dim}
        ends = np.cumsum(list(widths.values()))
        self.columns = {name: slice(end - width, end) for (name, width), end in zip(widths.items(), ends.tolist(), strict=True) if width}
        self.records = np.zeros((capacity, ends[-1]), np.float32)
        self.arrays: Batch = self.fields(self.records)         # views, by field
        self.gamma_powers = (gamma ** np.arange(64)).astype(np.float32)
        self.ends: dict[int, np.ndarray] = {}                  # the true observation (Do,) behind the last action of the segment that ends there

    def add(self, segment: Segment) -> None:
        """Append; the oldest transitions make room. ValueError on wrong shapes, non-finite numbers or a segment longer than the ring."""
        self.check(segment)
        n = len(segment)
        at = (self.head + np.arange(n)) % self.capacity
        a = self.arrays
        for position in at[a["remaining"][at] == 1].tolist():                       # segments that end here are overwritten
            self.ends.pop(position, None)
        a["obs"][at], a["action"][at], a["reward"][at] = segment.observations[:-1], segment.actions, segment.rewards
        a["suffix"][at] = discounted_suffix(segment.rewards, self.gamma)[:-1]
        a["remaining"][at] = np.arange(n, 0, -1)
        a["terminated"][at] = segment.terminated
        a["gain"][at] = np.nan if segment.gains is None else segment.gains
        if self.plan_horizon:
            a["plan"][at] = 0 if segment.plans is None else segment.plans
        self.ends[int(at[-1])] = np.array(segment.observations[-1], np.float32)
        self.head = (self.head + n) % self.capacity
        self.size = min(self.size + n, self.capacity)
        self.total += n

    def check(self, segment: Segment) -> None:
        n, (obs_dim, action_dim) = len(segment), (self.arrays["obs"].shape[1], self.arrays["action"].shape[1])
        expected = {"observations": (n + 1, obs_dim), "actions": (n, action_dim), "rewards": (n,)}
        if self.plan_horizon and segment.plans is not None:
            expected["plans"] = (n, self.plan_horizon, action_dim)
        if segment.gains is not None and segment.gains.shape != (n,):
            raise ValueError(f"segment {segment.id!r}: gains has shape {segment.gains.shape}, expected {(n,)}")
        for name, shape in expected.items():
            value = getattr(segment, name)
            if value.shape != shape:
                raise ValueError(f"segment {segment.id!r}: {name} has shape {value.shape}, expected {shape}")
            if not np.isfinite(value).all():
                raise ValueError(f"segment {segment.id!r}: {name} holds a non-finite number at index {np.argwhere(~np.isfinite(value))[0].tolist()}")
        if not 0 < n <= self.capacity:
            raise ValueError(f"segment {segment.id!r}: {n} transitions, expected 1..{self.capacity} (replay.capacity)")

    def draw(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """n start positions, uniform over the stored transitions."""
        if not self.size:
            raise ValueError("replay is empty: add a segment before sampling")
        return rng.integers(0, self.size, n) if self.size < self.capacity else rng.integers(0, self.capacity, n)

    def sequences(self, start: np.ndarray, horizon: int, n_step: int) -> Batch:
        """Sequences for the world model and the critic, from start positions (B,).

        obs (B, H+1, Do): s_t .. s_{t+H}; action (B, H, Da); reward (B, H); terminated (B, H) bool: step ended the episode;
        mask (B, H): the step exists; value_mask (B, H+1): s_{t+k} starts a stored step; n_step_return (B, H+1) = sum_{j<n} gamma^j r_{t+k+j};
        discount (B, H+1) = gamma^n, 0 after a termination; bootstrap_obs (B, H+1, Do) = s_{t+k+n}. n is cut at the segment's end.
        """
        k = np.arange(horizon + 1)
        remaining = self.arrays["remaining"][start, None]                           # (B, 1)
        step = np.minimum(k, remaining - 1)                                         # (B, H+1) offsets that stay inside the segment
        n = np.minimum(n_step, remaining - step)                                    # (B, H+1) steps really summed
        inside = remaining - step > n                                               # the segment goes on behind the n steps
        after = step + n - ~inside                                                  # where the n steps lead, or the segment's last record
        positions = start[:, None] + np.concatenate([step, after], 1)
        positions[positions >= self.capacity] -= self.capacity
        got = self.records.take(positions.ravel(), 0, mode="clip").reshape(len(start), 2, horizon + 1, self.records.shape[1])   # the one gather
        here, there = self.fields(got[:, 0]), self.fields(got[:, 1])                # (B, H+1, .)
        gamma_n = self.powers(n)
        obs, bootstrap = np.ascontiguousarray(here["obs"]), np.ascontiguousarray(there["obs"])
        last = (start[:, None] + remaining - 1) % self.capacity                     # (B, 1) the segment's last record
        self.put_ends(obs, k == remaining, last)                                    # the true observation behind the segment's last action
        self.put_ends(bootstrap, ~inside, last)
        terminated, exists = here["terminated"] > 0, k < remaining
        return {"obs": obs, "action": np.ascontiguousarray(here["action"][:, :horizon]), "reward": np.ascontiguousarray(here["reward"][:, :horizon]),
                "terminated": (terminated & (k + 1 == remaining))[:, :horizon], "mask": exists[:, :horizon].astype(np.float32),
                "value_mask": exists.astype(np.float32), "n_step_return": here["suffix"] - gamma_n * (there["suffix"] * inside),
                "discount": gamma_n * (inside | ~terminated), "bootstrap_obs": bootstrap}

    def fields(self, records: np.ndarray) -> Batch:
        """Views (..., width) of records (..., F) by name, numbers without their axis of one. float32; remaining and terminated share its memory as int32."""
        whole = records.view(np.int32)
        found = {name: (whole if name in ("remaining", "terminated") else records)[..., columns] for name, columns in self.columns.items()}
        if self.plan_horizon:
            found["plan"] = found["plan"].reshape(*records.shape[:-1], self.plan_horizon, self.columns["action"].stop - self.columns["action"].start)
        return {name: v[..., 0] if name in ("reward", "suffix", "gain", "remaining", "terminated") else v for name, v in found.items()}

    def powers(self, n: np.ndarray) -> np.ndarray:
        """gamma^n, float32, for n >= 0."""
        if n.max(initial=0) >= len(self.gamma_powers):
            return np.power(self.gamma, n).astype(np.float32)
        return self.gamma_powers[n]

    def put_ends(self, obs: np.ndarray, where: np.ndarray, last: np.ndarray) -> None:
        """Into obs (B, K, Do), where (B, K) says so: the observation behind the segment that ends at position last (B, 1)."""
        rows, columns = np.nonzero(where)
        for row, column, position in zip(rows.tolist(), columns.tolist(), last[rows, 0].tolist(), strict=True):
            obs[row, column] = self.ends[position]

    def chunks(self, start: np.ndarray, horizon: int, n_step: int, planned: bool) -> Batch:
        """Targets of the denoising loss, from start positions (B,).

        obs (B, Do); chunk (B, H, Da): the executed actions, or the stored plan where one exists and `planned`; mask (B, H); gain (B,);
        n_step_return, discount (B,), bootstrap_obs (B, Do): what the realised-advantage rule needs.
        """
        seq = self.sequences(start, horizon, n_step)
        chunk, mask, gain = seq["action"], seq["mask"], self.arrays["gain"][start]
        if planned and self.plan_horizon:
            own = np.flatnonzero(~np.isnan(gain))
            h = min(horizon, self.plan_horizon)
            chunk[own, :h], mask[own] = self.arrays["plan"][start[own], :h], (np.arange(horizon) < h).astype(np.float32)
        return {"obs": seq["obs"][:, 0], "chunk": chunk, "mask": mask, "gain": gain, "n_step_return": seq["n_step_return"][:, 0],
                "discount": seq["discount"][:, 0], "bootstrap_obs": seq["bootstrap_obs"][:, 0]}

    def state(self) -> Batch:
        """Contents as arrays, oldest numbers included, for a checkpoint."""
        ends = {"end_positions": np.array(list(self.ends), np.int64), "end_obs": np.array(list(self.ends.values()), np.float32)}
        return {**{k: v[: self.size] for k, v in self.arrays.items()}, **ends, "cursor": np.array([self.size, self.head, self.total], np.int64)}

    def load_state(self, state: Batch) -> None:
        """Inverse of `state`; ValueError when it does not fit this buffer."""
        size, head, total = (int(x) for x in state["cursor"])
        missing = sorted({*self.arrays, "end_positions", "end_obs"} - set(state))
        if size > self.capacity or missing:
            raise ValueError(f"replay checkpoint does not fit: {size} transitions for a capacity of {self.capacity}, missing arrays: {missing or 'none'}")
        wrong = [f"{k} {state[k].shape}, expected {(size, *v.shape[1:])}" for k, v in self.arrays.items() if state[k].shape != (size, *v.shape[1:])]
        if wrong:
            raise ValueError(f"replay checkpoint does not fit: {'; '.join(wrong)}")
        shift = head if size < self.capacity else 0             # a full ring restored into a larger one: unroll it, oldest first
        for k, v in self.arrays.items():
            v[:size] = np.roll(state[k], -shift, 0)
        positions = (state["end_positions"] - shift) % max(size, 1)
        self.ends = dict(zip(positions.tolist(), np.array(state["end_obs"], np.float32), strict=True))
        self.size, self.head, self.total = size, size if size < self.capacity else head, total


class MixedReplay:
    """Offline data (fixed) beside online data (ring), with a share of each in every batch."""

    def __init__(self, offline: ReplayBuffer, online: ReplayBuffer, seed: int, planned: bool):
        self.offline, self.online, self.planned = offline, online, planned
        self.rng = np.random.default_rng(seed)
        self.seen = SeenIds()

    def add(self, segment: Segment) -> bool:
        """Store an online segment; False when its id was stored before."""
        if segment.id and segment.id in self.seen:
            return False
        self.online.add(segment)
        if segment.id:
            self.seen.add(segment.id)
        return True

    def split(self, batch: int, online_share: float) -> tuple[np.ndarray, np.ndarray]:
        n_online = round(batch * online_share) if self.online.size else 0
        return self.offline.draw(self.rng, batch - n_online), self.online.draw(self.rng, n_online) if n_online else np.zeros(0, np.int64)

    def sequences(self, batch: int, horizon: int, n_step: int, online_share: float) -> Batch:
        off, on = self.split(batch, online_share)
        parts = [self.offline.sequences(off, horizon, n_step)] + ([self.online.sequences(on, horizon, n_step)] if len(on) else [])
        return {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}

    def chunks(self, batch: int, horizon: int, n_step: int, online_share: float) -> Batch:
        off, on = self.split(batch, online_share)
        parts = [self.offline.chunks(off, horizon, n_step, False)] + ([self.online.chunks(on, horizon, n_step, self.planned)] if len(on) else [])
        out = {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
        out["online"] = np.concatenate([np.zeros(len(off), bool), np.ones(len(on), bool)])
        return out
