"""Replay of segments: a preallocated ring of transitions whose sequences never cross a segment's end.

A segment is a run of consecutive transitions of one episode. Every stored transition can start a sequence; a sequence that reaches its
segment's end is padded and masked. n-step returns come from a discounted suffix sum kept per transition, so any n costs the same.
Symbols: B rows, H horizon, Do / Da sizes.
"""

from __future__ import annotations

import math
import mmap
from contextlib import suppress

import numpy as np

from modip_ray.learning.segment import SeenIds, Segment

Batch = dict[str, np.ndarray]


def discounted_suffix(rewards: np.ndarray, gamma: float) -> np.ndarray:
    """G (T+1,) float64 with G_t = r_t + gamma * G_{t+1} and G_T = 0."""
    out = np.zeros(len(rewards) + 1)
    for t in range(len(rewards) - 1, -1, -1):
        out[t] = rewards[t] + gamma * out[t + 1]
    return out


def lambda_steps(rng: np.random.Generator, rows: int, n_step: int, td_lambda: float) -> np.ndarray:
    """How many steps n (rows,) each target sums: n_step, or, with td_lambda < 1, drawn from (1 - lambda) lambda^(n-1), the rest of it at n_step.

    The expected n-step return is then the lambda-return cut at n_step (Sutton and Barto, 12.1), without a value of the states between.
    """
    return np.full(rows, n_step) if td_lambda == 1 else np.minimum(rng.geometric(1 - td_lambda, rows), n_step)


def zeros(shape: tuple[int, ...]) -> np.ndarray:
    """float32 zeros that take memory as they are written, in large pages where the system has them: rows are read at random places, and with small pages
    each read would look its page up in memory too."""
    memory = mmap.mmap(-1, max(4 * math.prod(shape), 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):                                 # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.float32, math.prod(shape)).reshape(shape)


class ReplayBuffer:
    """A ring over `capacity` transitions. Not thread-safe: its owner calls it from one place.

    Transitions are counted from 0 as they come; number i lies at position i % capacity. One is a row of `steps`, so a sequence lies in one piece of
    memory. What comes after a transition is the next row's observation; only a segment's last observation is kept apart, once for each segment.
    """

    def __init__(self, capacity: int, obs_dim: int, action_dim: int, gamma: float, plan_horizon: int = 0, steps: np.ndarray | None = None):
        """steps: memory for the rows, (capacity, obs_dim + action_dim + 4) float32 zeros; None: of this process."""
        self.capacity, self.gamma, self.plan_horizon = capacity, gamma, plan_horizon
        self.size, self.total = 0, 0                            # transitions that are there, and that ever came
        widths = {"obs": obs_dim, "action": action_dim, "reward": 1,
                  "suffix": 1,                                  # discounted return to the segment's end
                  "remaining": 1,                               # transitions from here to the segment's end, this one included
                  "end": 1}                                     # where the segment's end is described
        ends = np.cumsum(list(widths.values()))
        self.columns = {name: slice(end - width, end) for (name, width), end in zip(widths.items(), ends.tolist(), strict=True)}
        self.steps = zeros((capacity, int(ends[-1]))) if steps is None else steps
        self.whole = self.steps.view(np.int32)
        self.arrays: Batch = self.fields(self.steps)            # views, by field
        if plan_horizon:
            self.arrays |= {"gain": zeros((capacity,)), "plan": zeros((capacity, plan_horizon, action_dim))}
        self.gamma_powers = (gamma ** np.arange(64)).astype(np.float32)
        self.end_obs = np.zeros((1, obs_dim), np.float32)       # the true observation behind a segment's last action, by `end`
        self.end_terminated = np.zeros(1, bool)                 # the segment ends in a real termination, by `end`
        self.free_ends, self.open_end = [0], None               # of these, those not in use; and that of a segment whose last rows are still to come

    @property
    def head(self) -> int:
        """Where the next transition goes."""
        return self.total % self.capacity

    def newest(self, n: int) -> np.ndarray:
        """Positions of the newest n transitions, oldest first."""
        return np.arange(self.total - n, self.total) % self.capacity

    def add(self, segment: Segment) -> None:
        """Append; the oldest transitions make room. ValueError on wrong shapes, non-finite numbers or a segment longer than the ring."""
        self.check(segment)
        at, a = self.make_room(len(segment)), self.arrays
        a["obs"][at], a["action"][at], a["reward"][at] = segment.observations[:-1], segment.actions, segment.rewards
        a["suffix"][at] = discounted_suffix(segment.rewards, self.gamma)[:-1]
        a["remaining"][at] = np.arange(len(at), 0, -1)
        a["end"][at] = end = self.take_end()
        self.end_obs[end], self.end_terminated[end] = segment.observations[-1], segment.terminated
        if self.plan_horizon:
            a["gain"][at] = np.nan if segment.gains is None else segment.gains
            a["plan"][at] = 0 if segment.plans is None else segment.plans

    def make_room(self, n: int) -> np.ndarray:
        """Positions (n,) of the next n transitions; the ends of segments that are overwritten are free again."""
        at = (self.head + np.arange(n)) % self.capacity
        self.free_ends += self.arrays["end"][at[self.arrays["remaining"][at] == 1]].tolist()
        self.size, self.total = min(self.size + n, self.capacity), self.total + n
        return at

    def take_end(self) -> int:
        """Where to describe the end of one more segment."""
        if not self.free_ends:
            used = len(self.end_obs)
            self.end_obs, self.end_terminated = (np.concatenate([x, np.zeros_like(x)]) for x in (self.end_obs, self.end_terminated))
            self.free_ends = list(range(2 * used - 1, used - 1, -1))
        return self.free_ends.pop()

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
        first = (self.total - self.size) % self.capacity
        drawn = rng.integers(0, self.size, n)
        return drawn if self.size == self.capacity or not first else (first + drawn) % self.capacity

    def sequences(self, start: np.ndarray, horizon: int, n_step: int | np.ndarray) -> Batch:
        """Sequences for the world model and the critic, from start positions (B,); n_step: n of all rows, or (B,).

        obs (B, H+1, Do): s_t .. s_{t+H}; action (B, H, Da); reward (B, H); terminated (B, H) bool: step ended the episode;
        mask (B, H): the step exists; value_mask (B, H+1): s_{t+k} starts a stored step; n_step_return (B, H+1) = sum_{j<n} gamma^j r_{t+k+j};
        discount (B, H+1) = gamma^n, 0 after a termination; bootstrap_obs (B, H+1, Do) = s_{t+k+n}. n is cut at the segment's end.
        """
        from modip_ray.learning.gather import gather  # compiled code, for those processes alone that sample
        rows, k = len(start), horizon + 1
        obs_dim, action_dim = self.arrays["obs"].shape[1], self.arrays["action"].shape[1]
        obs, bootstrap, action = (np.empty((rows, n), np.float32) for n in (k * obs_dim, k * obs_dim, horizon * action_dim))
        reward, mask, value_mask, returns, discount = (np.empty((rows, n), np.float32) for n in (horizon, horizon, k, k, k))
        terminated, most = np.empty((rows, horizon), bool), min(int(np.max(n_step, initial=1)), self.capacity)
        steps = np.minimum(np.broadcast_to(n_step, rows), most).astype(np.uint64)
        gather(self.steps, self.whole, start.astype(np.int64, copy=False).view(np.uint64), steps, self.powers(most), self.end_obs, self.end_terminated,
               obs, bootstrap, action, reward, terminated, mask, value_mask, returns, discount)
        return {"obs": obs.reshape(rows, k, obs_dim), "action": action.reshape(rows, horizon, action_dim), "reward": reward, "terminated": terminated,
                "mask": mask, "value_mask": value_mask, "n_step_return": returns, "discount": discount, "bootstrap_obs": bootstrap.reshape(rows, k, obs_dim)}

    def fields(self, steps: np.ndarray) -> Batch:
        """Views (..., width) of rows (..., F) by name, numbers without their axis of one. float32; remaining and end share its memory as int32."""
        whole = steps.view(np.int32)
        found = {name: (whole if name in ("remaining", "end") else steps)[..., columns] for name, columns in self.columns.items()}
        return {name: v if name in ("obs", "action") else v[..., 0] for name, v in found.items()}

    def powers(self, most: int) -> np.ndarray:
        """gamma^n, float32, for n = 0 .. most at least."""
        if len(self.gamma_powers) <= most:
            self.gamma_powers = (self.gamma ** np.arange(most + 1)).astype(np.float32)
        return self.gamma_powers

    def chunks(self, start: np.ndarray, horizon: int, n_step: int, planned: bool) -> Batch:
        """Targets of the denoising loss, from start positions (B,).

        obs (B, Do); chunk (B, H, Da): the executed actions, or the stored plan where one exists and `planned`; mask (B, H); gain (B,);
        n_step_return, discount (B,), bootstrap_obs (B, Do): what the realised-advantage rule needs.
        """
        seq = self.sequences(start, horizon, n_step)
        chunk, mask = seq["action"], seq["mask"]
        gain = self.arrays["gain"][start] if self.plan_horizon else np.full(len(start), np.nan, np.float32)
        if planned and self.plan_horizon:
            own = np.flatnonzero(~np.isnan(gain))
            h = min(horizon, self.plan_horizon)
            chunk[own, :h], mask[own] = self.arrays["plan"][start[own], :h], (np.arange(horizon) < h).astype(np.float32)
        return {"obs": seq["obs"][:, 0], "chunk": chunk, "mask": mask, "gain": gain, "n_step_return": seq["n_step_return"][:, 0],
                "discount": seq["discount"][:, 0], "bootstrap_obs": seq["bootstrap_obs"][:, 0]}

    def rows(self, first: int, last: int) -> Batch:
        """Transitions number first..last-1, copied, for a file: `steps` (n, F) with 1 or 0 in place of `end`: the segment ends in a termination; gain and
        plan, if there are any; `end_obs` (m, Do): the observations behind the segments that end here, in order."""
        at = np.arange(first, last) % self.capacity
        out = {k: self.arrays[k][at] for k in ("gain", "plan") if k in self.arrays} | {"steps": self.steps[at]}
        fields = self.fields(out["steps"])
        out["end_obs"] = self.end_obs[fields["end"][fields["remaining"] == 1]]
        fields["end"][:] = self.end_terminated[fields["end"]]
        return out

    def extend(self, rows: Batch) -> None:
        """Append what `rows` gave, at most `capacity` of them. ValueError when they do not fit this buffer; then nothing has changed."""
        n = len(rows["steps"])
        expected = {"steps": (n, self.steps.shape[1]), **{k: (n, *self.arrays[k].shape[1:]) for k in ("gain", "plan") if k in self.arrays}}
        found = {k: rows[k].shape if k in rows else "missing" for k in expected}
        wrong = [f"{k} {found[k]}, expected {shape}" for k, shape in expected.items() if found[k] != shape]
        if wrong or n > self.capacity:
            raise ValueError(f"{n} stored transitions do not fit the replay of {self.capacity}: {'; '.join(wrong) or 'replay.capacity is too small'}")
        at, fields = self.make_room(n), self.fields(np.ascontiguousarray(rows["steps"], np.float32))
        last = fields["remaining"] == 1
        segment = np.cumsum(last) - last                        # (n,) which of the segments that are touched here
        ends = [self.take_end() for _ in range(int(segment[-1]) + 1 - (self.open_end is not None))]
        ends = np.array([self.open_end, *ends] if self.open_end is not None else ends)
        self.end_terminated[ends[segment]] = fields["end"]
        self.end_obs[ends[:int(last.sum())]] = rows["end_obs"]
        for k in expected:
            (self.steps if k == "steps" else self.arrays[k])[at] = rows[k]
        self.arrays["end"][at] = ends[segment]
        self.open_end = None if last[-1] else int(ends[-1])


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

    def sequences(self, batch: int, horizon: int, n_step: int, online_share: float, td_lambda: float = 1.0) -> Batch:
        off, on = self.split(batch, online_share)
        n = lambda_steps(self.rng, batch, n_step, td_lambda)                        # (B,)
        parts = [self.offline.sequences(off, horizon, n[:len(off)])] + ([self.online.sequences(on, horizon, n[len(off):])] if len(on) else [])
        return {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}

    def chunks(self, batch: int, horizon: int, n_step: int, online_share: float) -> Batch:
        off, on = self.split(batch, online_share)
        parts = [self.offline.chunks(off, horizon, n_step, False)] + ([self.online.chunks(on, horizon, n_step, self.planned)] if len(on) else [])
        out = {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
        out["online"] = np.concatenate([np.zeros(len(off), bool), np.ones(len(on), bool)])
        return out
