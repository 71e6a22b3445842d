"""Everything that acts, in one module: normaliser, diffusion policy (EMA), world model, critic; and its flat weight vector."""

from __future__ import annotations

import copy
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from modip_ray.baselines.dsrl import SteeredPolicy
from modip_ray.baselines.tdmpc2 import LatentPolicy
from modip_ray.config import Config
from modip_ray.model.critic import ValueEnsemble
from modip_ray.model.diffusion import DiffusionPolicy
from modip_ray.model.gaussian import GaussianPolicy, make_policy
from modip_ray.model.networks import flat_vector, load_vector
from modip_ray.model.policy_critic import PolicyCritic, asks_policy
from modip_ray.model.world_model import WorldModel

Part = Literal["policy", "model"]


class Normalizer(nn.Module):
    """Observations to zero mean and unit spread, or to -1..1 (clipped), actions from the environment's box to [-1, 1]."""

    obs_mean: Tensor
    obs_std: Tensor
    action_low: Tensor
    action_high: Tensor

    def __init__(self, obs_dim: int, action_dim: int, clip: float = 10.0):
        super().__init__()
        self.clip = clip
        for name, value in {"obs_mean": torch.zeros(obs_dim), "obs_std": torch.ones(obs_dim),
                            "action_low": -torch.ones(action_dim), "action_high": torch.ones(action_dim)}.items():
            self.register_buffer(name, value)

    def fit(self, observations: np.ndarray, action_low: np.ndarray, action_high: np.ndarray, floor: float, scale: str = "std") -> None:
        """From observations (T, Do). scale "std": by mean and standard deviation; "range": the data's least and greatest value become -1 and 1 (DPPO).

        `floor`: least divisor, so that a column that hardly moves in the data is not blown up outside it.
        """
        if scale == "range":
            low, high = observations.min(0).astype(np.float64), observations.max(0).astype(np.float64)
            centre, spread = (low + high) / 2, (high - low) / 2
        else:
            centre, spread = observations.mean(0, dtype=np.float64), observations.std(0, dtype=np.float64)
        self.obs_mean.copy_(torch.as_tensor(centre))
        self.obs_std.copy_(torch.as_tensor(np.maximum(spread, floor)))
        self.action_low.copy_(torch.as_tensor(action_low))
        self.action_high.copy_(torch.as_tensor(action_high))

    def obs(self, obs: Tensor) -> Tensor:
        return ((obs - self.obs_mean) / self.obs_std).clamp(-self.clip, self.clip)

    def action(self, action: Tensor) -> Tensor:
        return (2 * (action - self.action_low) / (self.action_high - self.action_low) - 1).clamp(-1, 1)

    def raw_action(self, action: Tensor) -> Tensor:
        return self.action_low + (action + 1) / 2 * (self.action_high - self.action_low)


def acting_policy(cfg: Config, obs_dim: int, action_dim: int) -> LatentPolicy | DiffusionPolicy | GaussianPolicy:
    if cfg.policy.kind == "tdmpc2":
        return LatentPolicy(cfg, action_dim)
    if cfg.policy.kind == "dsrl":
        return SteeredPolicy(cfg, obs_dim, action_dim)
    return make_policy(cfg, obs_dim, action_dim, cfg.policy.horizon)


class Agent(nn.Module):
    """The acting modules. The learner keeps its raw policy and the target critic beside it."""

    def __init__(self, cfg: Config, obs_dim: int, action_dim: int):
        super().__init__()
        self.obs_dim, self.action_dim = obs_dim, action_dim
        w, c = cfg.world_model, cfg.critic
        self.normalizer = Normalizer(obs_dim, action_dim)
        self.policy = acting_policy(cfg, obs_dim, action_dim)                       # the EMA weights
        self.world_model = WorldModel(obs_dim, action_dim, w.latent, w.width, w.simnorm_group)
        self.critic = PolicyCritic(cfg, action_dim) if asks_policy(cfg) else ValueEnsemble(w.latent, c.width, c.members, c.head, c.bins, c.bound,
                                                                                           c.expectile)

    @property
    def acting_part(self) -> Part | None:
        """What must be kept of an agent so that its policy acts as it does now: all of it where the policy takes latents."""
        return None if isinstance(self.policy, LatentPolicy) else "policy"

    def propose(self, obs: Tensor, noise: Tensor, steps: int) -> Tensor:
        """Chunks that the policy draws: obs (B, Do) normalised, standard normal noise (B, n, H, Da) -> (B, n, H, Da) in -1..1."""
        if isinstance(self.policy, LatentPolicy):
            return self.policy.unroll(self.world_model, self.world_model.encode(obs), noise)
        return self.policy.sample(obs, noise, steps)

    def first_action(self, obs: Tensor, noise: Tensor, steps: int) -> Tensor:
        """(B, Da), the beginning of one chunk a row, from noise (B, 1, H, Da)."""
        return self.propose(obs, noise[:, :, :1] if isinstance(self.policy, LatentPolicy) else noise, steps)[:, 0, 0]

    def act(self, obs: Tensor, noise: Tensor, steps: int) -> Tensor:
        """What is executed where the policy acts alone: a chunk a row (B, H, Da), from noise (B, n, H, Da) the mean of n; a Gaussian's means."""
        if isinstance(self.policy, LatentPolicy):
            return self.propose(obs, torch.zeros_like(noise[:, :1]), steps)[:, 0]
        return self.policy.act(obs, noise, steps)

    def tail_value(self, z: Tensor) -> Tensor:
        """Q(z, pi(z)), (R, Dz) -> (E, R). pi is the acting policy where that takes latents, else the critic's own policy of the latent."""
        return self.critic.action_value(z, self.policy.mean(z)) if isinstance(self.policy, LatentPolicy) else self.critic.policy_value(z)

    def part(self, name: Part | None = None) -> dict[str, Tensor]:
        """Parameters and buffers, by name and shared with the agent: of everything, of the policy, or of world model and critic ("model")."""
        prefixes = {None: ("",), "policy": ("policy.",), "model": ("world_model.", "critic.")}
        if name not in prefixes:
            raise ValueError(f"agent part {name!r}; there are 'policy', 'model' and None for all")
        return {key: t for key, t in self.state_dict().items() if key.startswith(prefixes[name])}

    def flat(self, part: Part | None = None) -> np.ndarray:
        """A part's parameters and buffers as one float32 vector: what a learner publishes."""
        return flat_vector(self.part(part).values())

    def load_flat(self, vector: np.ndarray, part: Part | None = None) -> None:
        """Inverse of `flat`, in place. ValueError when the vector's length does not fit this configuration."""
        load_vector(self.part(part).values(), vector, part or "this agent")

    def frozen_copy(self) -> Agent:
        return copy.deepcopy(self).requires_grad_(False).eval()
