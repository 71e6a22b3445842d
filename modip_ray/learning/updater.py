"""One learner role: which update follows, at which step size, and what it adds up to. Plain object, no Ray."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import torch

from modip_ray.config import Config
from modip_ray.learning.checkpoint import CheckpointError
from modip_ray.learning.guard import DivergedError, extremes
from modip_ray.learning.learner import Learner, Metrics, mean_metrics
from modip_ray.learning.limiter import STREAMS, Stream, offline_updates, updates_per_step
from modip_ray.model.hardware import go_on
from modip_ray.model.networks import load_vector
from modip_ray.tasks.envs import env_seed
from modip_ray.timing import Timer

State = dict[str, np.ndarray]


class Snapshot(NamedTuple):
    count: int                      # updates made when it was taken
    state: State                    # as `learner_state` has it


class Updater:
    """Drives a `Learner` by batches. Serially one Updater makes both streams of updates; under Ray each stream has its own process and Updater.

    After learner.max_bad_updates skipped updates in a row a stream goes back to its last good snapshot; `incidents` says so, in words.
    """

    def __init__(self, cfg: Config, learner: Learner, timer: Timer | None = None):
        self.cfg, self.learner, self.timer = cfg, learner, timer or Timer()
        self.rows: dict[Stream, list[Metrics]] = {s: [] for s in STREAMS}
        self.snapshots: dict[Stream, Snapshot] = {}
        self.roll_backs: dict[Stream, int] = dict.fromkeys(STREAMS, 0)              # since the last snapshot
        self.incidents: list[str] = []

    def count(self, stream: Stream) -> int:
        """Updates made."""
        return self.learner.updates if stream == "model" else self.learner.policy_updates

    def update(self, stream: Stream, batch: Mapping[str, np.ndarray]) -> None:
        """The next update of a stream: offline ones first, with a cosine step size and plain behaviour cloning, then online ones."""
        if stream not in self.snapshots:
            self.take_snapshot(stream)
        count, offline = self.count(stream), offline_updates(self.cfg)[stream]
        online = count >= offline
        done, planned = (count - offline, updates_per_step(self.cfg)[stream] * self.cfg.online.env_steps) if online else (count, offline)
        self.learner.set_lr(done / max(planned, 1.0), online)
        if stream == "policy" and count == offline and self.learner.begin_online():
            self.take_snapshot(stream)                                              # a roll-back does not go behind the change of loss
        with self.timer(f"update/{stream}"):
            metrics = self.learner.update_model(batch) if stream == "model" else self.learner.update_policy(batch, distil=online)
        self.rows[stream].append(metrics)
        if (count + 1) % self.cfg.learner.max_bad_updates == 0:                     # the device is asked now and then only
            self.check(stream, batch)

    def take_metrics(self) -> dict[str, float]:
        """Means over the updates since the last call, and how many were skipped since this process began."""
        means = {k: v for s in STREAMS for k, v in mean_metrics(self.rows[s]).items()}
        skipped = {f"guard/skipped_{s}": float(self.learner.guards[s].skipped) for s in STREAMS if self.rows[s]}
        if self.rows["model"] and self.cfg.critic.updates_per_update > 1:
            skipped["guard/skipped_value"] = float(self.learner.value_guard.skipped)
        self.rows = {s: [] for s in STREAMS}
        return means | skipped

    def take_incidents(self) -> list[str]:
        incidents, self.incidents = self.incidents, []
        return incidents

    # ---- the way back from numbers that are not finite or explode ------------------------------------------------------------------------------

    def check(self, stream: Stream, batch: Mapping[str, np.ndarray]) -> None:
        """Go back where all updates since the last check were skipped; take a snapshot where one is due and the numbers are good."""
        streak = max(int(guard.streak) for guard in self.learner.guards_of(stream))
        if streak >= self.cfg.learner.max_bad_updates:
            self.roll_back(stream, streak, batch)
        elif not streak and self.count(stream) - self.snapshots[stream].count >= self.cfg.learner.snapshot_every:
            self.take_snapshot(stream)

    def take_snapshot(self, stream: Stream) -> None:
        """Weights that are not finite make none: the one before stays."""
        if math.isfinite(largest(learner_tensors(self.learner, stream).values())) or stream not in self.snapshots:
            before = {stream: self.snapshots[stream].state} if stream in self.snapshots else None
            self.snapshots[stream] = Snapshot(self.count(stream), learner_state(self.learner, [stream], before)[stream])
            self.roll_backs[stream] = 0

    def roll_back(self, stream: Stream, streak: int, batch: Mapping[str, np.ndarray]) -> None:
        """Weights and optimiser of the last snapshot; the count of updates goes on. DivergedError where that was done too often already."""
        last = ", ".join(f"{k} {float(v):.4g}" for k, v in self.rows[stream][-1].items())
        seen = (f"the {stream} learner skipped its last {streak} updates, up to number {self.count(stream)}; the last one had {last}; "
                f"largest weight {largest(learner_tensors(self.learner, stream).values()):.4g}; its batch: {extremes(batch)}")
        self.roll_backs[stream] += 1
        if self.roll_backs[stream] > self.cfg.learner.max_roll_backs:
            name = "world_model.lr" if stream == "model" else "policy.lr"
            raise DivergedError(f"training does not recover after {self.cfg.learner.max_roll_backs} roll-backs (learner.max_roll_backs): {seen}. Look for "
                                f"such numbers in the data or the environment's rewards, or lower {name}; the same command resumes from the last checkpoint")
        count, snapshot = self.count(stream), self.snapshots[stream]
        load_learner(self.learner, stream, snapshot.state | {"updates": np.array(count)})
        for guard in self.learner.guards_of(stream):
            guard.reset()
        self.incidents.append(f"{seen}; back to the weights of update {snapshot.count}")


def largest(tensors: Iterable[torch.Tensor]) -> float:
    """Greatest absolute value; NaN where one is NaN."""
    return float(torch.stack([t.detach().abs().max() for t in tensors if t.numel()]).max())


# ---- checkpoint parts ------------------------------------------------------------------------------------------------------------------------

def part_of(name: str) -> Stream:
    """Which stream trains (and so checkpoints) a tensor, by its name in `learner_tensors`."""
    return "policy" if name.startswith(("agent.policy.", "policy_raw.", "policy_opt.", "rng")) else "model"


def learner_state(learner: Learner, streams: Iterable[Stream] = STREAMS, into: Mapping[Stream, State] | None = None) -> dict[Stream, State]:
    """Weights, running averages, optimiser moments and step counts, generator and counters, by the stream that trains them.

    into: what an earlier call returned and nobody needs any more; its arrays are written over, where they fit, instead of new ones made. Megabytes that
    are copied and freed every few seconds leave gaps that a process grows by.
    """
    arrays: State = {}
    for module_name, module in learner.modules().items():
        arrays |= {f"{module_name}.{k}": t.detach().cpu().numpy() for k, t in module.state_dict().items()}
    for opt_name, opt in learner.optimizers().items():
        for i, moments in opt.state_dict()["state"].items():
            arrays |= {f"{opt_name}.{i}.{k}": torch.as_tensor(t).detach().cpu().numpy() for k, t in moments.items()}
    arrays["rng"] = learner.rng.get_state().numpy()
    parts: dict[Stream, State] = {s: {k: copied(v, into[s].get(k) if into else None) for k, v in arrays.items() if part_of(k) == s} for s in streams}
    for s, part in parts.items():
        part["updates"] = np.array(learner.updates if s == "model" else learner.policy_updates)
        part["guard"], part["streak"] = (t.cpu().numpy().copy() for t in (learner.guards[s].recent, learner.guards[s].streak))
    if "model" in parts:
        parts["model"]["value_guard"] = learner.value_guard.recent.cpu().numpy().copy()
    return parts


def copied(value: np.ndarray, over: np.ndarray | None) -> np.ndarray:
    if over is None or over.shape != value.shape or over.dtype != value.dtype:
        return value.copy()
    np.copyto(over, value)
    return over


def load_learner(learner: Learner, stream: Stream, state: Mapping[str, np.ndarray]) -> None:
    """Restore what one stream trains. CheckpointError where the checkpoint and this configuration's networks differ."""
    own = learner_tensors(learner, stream)
    missing, odd = sorted(set(own) - set(state)), [k for k, t in own.items() if k in state and state[k].shape != tuple(t.shape)]
    if missing or odd:
        raise CheckpointError(f"the {stream} learner's checkpoint does not fit these settings: missing {missing[:3] or 0}, other shapes {odd[:3] or 0}")
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.copy_(torch.from_numpy(np.array(state[key])))
    for name, opt in learner.optimizers().items():
        if part_of(f"{name}.") == stream:
            opt.load_state_dict({"state": moments(state, name), "param_groups": opt.state_dict()["param_groups"]})
    guard = learner.guards[stream]
    for name, tensor in {"guard": guard.recent, "streak": guard.streak, "value_guard": learner.value_guard.recent}.items():
        if name in state:                                                           # older checkpoints lack some
            tensor.copy_(torch.from_numpy(np.array(state[name])))
    if stream == "model":
        learner.updates = int(state["updates"])
    else:
        learner.policy_updates = int(state["updates"])
        go_on(learner.rng, state["rng"], env_seed(learner.cfg.seed, learner.policy_updates))


def load_parts(learner: Learner, parts: Mapping[str, np.ndarray]) -> None:
    """What the other stream's learner published: "model" or "policy" of the agent, and "target_critic", as flat vectors."""
    for part, vector in parts.items():
        if part == "target_critic":
            load_vector(learner.target_critic.state_dict().values(), vector, "the target critic")
        else:
            learner.agent.load_flat(vector, part)


def learner_tensors(learner: Learner, stream: Stream) -> dict[str, torch.Tensor]:
    """Parameters and buffers that a stream checkpoints, shared with the modules."""
    return {name: t for prefix, module in learner.modules().items() for key, t in module.state_dict().items() if part_of(name := f"{prefix}.{key}") == stream}


def moments(state: Mapping[str, np.ndarray], opt_name: str) -> dict[int, dict[str, torch.Tensor]]:
    """An optimiser's per-parameter state out of flat names such as "model_opt.3.exp_avg"."""
    found: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in state.items():
        if key.startswith(f"{opt_name}."):
            _, index, name = key.split(".")
            found.setdefault(int(index), {})[name] = torch.from_numpy(np.array(value))
    return found
