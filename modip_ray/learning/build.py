"""From settings and offline episodes to the objects that learn: agent with fitted scales, offline and online replay, learner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from modip_ray.config import Config, ConfigError
from modip_ray.learning.checkpoint import Checkpoint, CheckpointError
from modip_ray.learning.replay import ReplayBuffer
from modip_ray.learning.replay_server import offline_replay
from modip_ray.model.agent import Agent
from modip_ray.tasks.episode import Episode

LEAST_SCALE = 1e-6
RARE = -7.0                         # logit of a termination where the data hold none: one in a thousand, until online data say otherwise
TAIL = 100                          # steps before a time limit whose returns are cut short


@dataclass(frozen=True)
class Spec:
    """Sizes and bounds of the environment, and the first weights of everything: all that a role needs to rebuild the agent."""

    obs_dim: int
    action_dim: int
    weights: np.ndarray             # Agent.flat() of the freshly built agent, normaliser and scales included


def device_of(cfg: Config, gpus: float | None = None) -> torch.device:
    """The device of a role; `gpus` is what it was given (None: not under Ray). "auto" takes CUDA where it exists; a role without a GPU computes on the CPU.

    cuda:N is a GPU of the machine only where this is the one process; Ray shows a role the GPU that it gave it and no other.
    """
    wanted = cfg.resources.device
    if gpus == 0 or wanted == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        device, there = torch.device("cuda" if wanted == "auto" or gpus else wanted), torch.cuda.device_count()
        if device.index is not None and device.index >= there:
            raise ConfigError(f"resources.device: got {wanted!r}, but this machine has {there} CUDA device(s), counted from cuda:0; use one of those")
        return device
    if wanted != "auto":
        raise ConfigError(f"resources.device: got {wanted!r}, but this machine has no CUDA device; use cpu or auto")
    return torch.device("cpu")


def check_device(cfg: Config) -> None:
    """ConfigError where a device is asked for that no role would use: under Ray those with a share of a GPU do."""
    r = cfg.resources
    if r.device.startswith("cuda") and not cfg.one_process and r.planner_gpus == r.learner_gpus == 0:
        raise ConfigError(f"resources.device: got {r.device!r}, but no role has a GPU; give some, e.g. resources.planner_gpus=0.4 resources.learner_gpus=0.4, "
                          "or train in one process (serial=true)")


def fitted_agent(cfg: Config, data: Sequence[Episode | Path], action_low: np.ndarray, action_high: np.ndarray) -> Agent:
    """A fresh agent (seeded) whose normaliser, reward scale and value scale come from the data."""
    torch.manual_seed(cfg.seed)
    parts = [offline_replay(cfg, [item]) for item in data] if isinstance(data[0], Path) else [offline_replay(cfg, data)]
    obs, reward = (np.concatenate([part.arrays[k] for part in parts]) for k in ("obs", "reward"))
    agent = Agent(cfg, obs.shape[1], parts[0].arrays["action"].shape[1])
    agent.normalizer.fit(obs, action_low, action_high, cfg.world_model.obs_std_floor, cfg.world_model.obs_scale)
    terminates = any(part.end_terminated.any() for part in parts)
    value = value_samples(parts, terminates)
    agent.world_model.reward_scale.fill_(safe_scale(reward))
    agent.world_model.terminates.fill_(float(terminates))
    if not terminates:
        agent.world_model.heads.bias.data[1] = RARE
    agent.critic.shift.fill_(float(value.mean()))
    agent.critic.scale.fill_(safe_scale(value) if cfg.critic.unit == "std" else float(np.abs(value).max()) or 1.0)
    return agent


def value_samples(parts: Sequence[ReplayBuffer], terminates: bool) -> np.ndarray:
    """Discounted returns to the episodes' ends (n,). Where nothing terminates, starts near the time limit are left out: theirs are cut short."""
    suffix, remaining = (np.concatenate([part.arrays[k] for part in parts]) for k in ("suffix", "remaining"))
    whole = suffix[remaining > TAIL]
    return whole if len(whole) and not terminates else suffix


def safe_scale(values: np.ndarray) -> float:
    """Standard deviation; where it is nil (constant values) their size, or 1, so that a division by it stays sane."""
    spread = float(values.std())
    return spread if spread > LEAST_SCALE else max(float(np.abs(values).mean()), 1.0)


def build_spec(cfg: Config, data: Sequence[Episode | Path], action_low: np.ndarray, action_high: np.ndarray) -> Spec:
    agent = fitted_agent(cfg, data, action_low, action_high)
    return Spec(agent.obs_dim, agent.action_dim, agent.flat())


def blank_agent(cfg: Config, obs_dim: int, action_dim: int, device: torch.device) -> Agent:
    """An agent whose weights are still to be loaded."""
    return Agent(cfg, obs_dim, action_dim).to(device)


def agent_of(cfg: Config, spec: Spec, device: torch.device) -> Agent:
    agent = Agent(cfg, spec.obs_dim, spec.action_dim)
    agent.load_flat(spec.weights)
    return agent.to(device)


def saved_agent(cfg: Config, checkpoint: Checkpoint, device: torch.device) -> Agent:
    """The agent of a checkpoint, as it acts. CheckpointError where the networks of `cfg` are not those that were saved."""
    parts = {**checkpoint.read("learner_model"), **checkpoint.read("learner_policy")}
    arrays = {k.removeprefix("agent."): torch.from_numpy(v) for k, v in parts.items() if k.startswith("agent.")}
    agent = Agent(cfg, len(arrays["normalizer.obs_mean"]), len(arrays["normalizer.action_low"]))
    load_weights(agent, arrays, checkpoint)
    return agent.to(device)


def load_weights(module: nn.Module, arrays: Mapping[str, Tensor], checkpoint: Checkpoint) -> None:
    """What `checkpoint` holds of a module, into it. CheckpointError where the module is another network."""
    try:
        module.load_state_dict(arrays)
    except RuntimeError as error:
        raise CheckpointError(f"{checkpoint.path}: holds other networks than these settings describe: {error}") from error
