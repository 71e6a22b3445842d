"""What a rollout worker runs: steps a group of environments with planned chunks and cuts segments for the replay. No torch, no Ray."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from modip_ray.learning.checkpoint import as_bytes
from modip_ray.learning.segment import Segment
from modip_ray.tasks.env_group import EnvGroup, FinishedEpisode, Transitions
from modip_ray.tasks.envs import EnvError, EnvFactory

SegmentHook = Callable[[Segment], Segment]


class Planned(NamedTuple):
    """The planner's answer for B rows: chunks to execute (B, c, Da), whole plans (B, H, Da), predicted gains (B,), weight version."""

    actions: np.ndarray
    plans: np.ndarray
    gains: np.ndarray
    version: int


class Query(NamedTuple):
    """A worker's question: observations (n, Do) of its environments, reset (n,): where an episode has just begun."""

    worker: Hashable                # who asks; a group of a worker's environments is a client of its own
    incarnation: str
    obs: np.ndarray
    reset: np.ndarray


class OpenSegment:
    """The transitions of one environment since its last cut."""

    def __init__(self):
        self.parts: list[Transitions] = []
        self.plans: list[np.ndarray] = []
        self.gains: list[np.ndarray] = []
        self.length = 0

    def add(self, t: Transitions, plan: np.ndarray, gain: float) -> None:
        """Only the step that was planned for carries the plan and its gain; for later steps of a chunk, whose plan is shorter, the gain is NaN."""
        k = len(t.rewards)
        plans, gains = np.zeros((k, *plan.shape), np.float32), np.full(k, np.nan, np.float32)
        plans[0], gains[0] = plan, gain
        self.parts.append(t)
        self.plans.append(plans)
        self.gains.append(gains)
        self.length += k

    def close(self, name: str) -> Segment:
        last = self.parts[-1]
        observations = np.concatenate([*(t.obs for t in self.parts), last.next_obs[-1:]])
        return Segment(observations, np.concatenate([t.actions for t in self.parts]), np.concatenate([t.rewards for t in self.parts]), last.terminated,
                       np.concatenate(self.plans), np.concatenate(self.gains), name)


class Collector:
    """Env i's first segment is cut at (i+1)/n of the length, so that the environments do not all send at once.

    `name` begins the segments' ids: worker/incarnation. `hook` may change each segment before it is sent (a user's own relabelling).
    """

    def __init__(self, env_factory: EnvFactory, num_envs: int, max_episode_steps: int, segment_length: int, seed: int | Sequence[int], name: str,
                 hook: SegmentHook | None = None, max_failures: float = 0.0):
        self.group = EnvGroup(env_factory, num_envs, max_episode_steps, seed, max_failures)
        self.name, self.hook = name, hook
        self.segment_length = segment_length
        self.cut_at = [max(1, segment_length * (i + 1) // num_envs) for i in range(num_envs)]
        self.open = [OpenSegment() for _ in range(num_envs)]
        self.ready: list[Segment] = []
        self.number = 0
        self.obs, self.reset = self.group.reset(), np.ones(num_envs, bool)

    def step(self, plan: Callable[[np.ndarray, np.ndarray], Planned]) -> int:
        """Ask `plan(obs (n, Do), reset (n,))` once and execute its chunks; returns the environment steps executed."""
        return self.execute(plan(self.obs, self.reset))

    def execute(self, planned: Planned) -> int:
        """Execute the chunks planned for `self.obs`; returns the environment steps executed."""
        result = self.group.step(planned.actions)
        for i, t in enumerate(result.transitions):
            if len(t.rewards):                                                      # an env that failed at once has none
                self.open[i].add(t, planned.plans[i], planned.gains[i])
            if t.terminated or t.truncated or self.open[i].length >= self.cut_at[i]:
                self.close(i)
        self.obs, self.reset = result.obs, result.reset
        return sum(len(t.rewards) for t in result.transitions)

    def close(self, i: int) -> None:
        """Cut env i's segment here: the episode goes on in the next one."""
        if not self.open[i].length:
            return
        segment = self.open[i].close(f"{self.name}/{self.number}")
        if self.hook is not None:
            segment = replace(self.hook(segment), id=segment.id)                    # one that is made anew goes by the same name: it is stored once
        self.ready.append(segment)
        self.number += 1
        self.open[i], self.cut_at[i] = OpenSegment(), self.segment_length

    def take_segments(self, flush: bool = False) -> list[Segment]:
        """Segments closed since the last call; `flush` cuts the open ones too."""
        for i in range(self.group.num_envs if flush else 0):
            self.close(i)
        ready, self.ready = self.ready, []
        return ready

    def state(self) -> dict[str, np.ndarray]:
        """The running episodes and the open segments (closed ones are to be taken first), for `resume`."""
        open_ = [segment.close("") for segment in self.open if segment.length]
        rows = {f"open.{key}": np.concatenate([getattr(s, key) for s in open_]) for key in ("observations", "actions", "rewards", "plans", "gains") if open_}
        lengths = np.array([segment.length for segment in self.open])
        return {f"group.{k}": v for k, v in self.group.state().items()} | rows | {
            "open.length": lengths, "cut_at": np.array(self.cut_at), "name": as_bytes(self.name), "number": np.array(self.number)}

    def resume(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on exactly where another collector of the same settings was. ValueError where the environments cannot (`EnvGroup.resume`)."""
        group = {k.removeprefix("group."): v for k, v in state.items() if k.startswith("group.")}
        self.group.resume(group)
        self.name, self.number, self.cut_at = state["name"].tobytes().decode(), int(state["number"]), state["cut_at"].tolist()
        self.obs, self.reset = group["obs"].copy(), group["length"] == 0
        begin, seen = 0, 0                                                          # rows before, and open segments before: each has an observation more
        for i, length in enumerate(state["open.length"].tolist()):
            if not length:
                continue
            obs, rows = state["open.observations"][begin + seen:begin + seen + length + 1], slice(begin, begin + length)
            self.open[i].parts = [Transitions(obs[:-1], state["open.actions"][rows], state["open.rewards"][rows], obs[1:], False, False)]
            self.open[i].plans, self.open[i].gains = [state["open.plans"][rows]], [state["open.gains"][rows]]
            self.open[i].length, begin, seen = length, begin + length, seen + 1

    def take_episodes(self) -> list[FinishedEpisode]:
        return self.group.finished_returns()

    def take_faults(self) -> list[EnvError]:
        """What environments did wrong since the last call, each time one was made anew."""
        faults, self.group.faults = self.group.faults, []
        return faults

    def shutdown(self) -> None:
        self.group.close()
