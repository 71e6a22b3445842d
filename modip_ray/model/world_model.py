"""Latent world model: z = h(s), (z', r, c) = d(z, a). TD-MPC2-like (arXiv 2310.16828), with one shared trunk for all three heads.

Symbols: B rows, H horizon, Do / Da / Dz sizes of observation, action, latent.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from modip_ray.model.networks import SimNormLinear, mlp


class WorldModel(nn.Module):
    """Rewards are predicted in units of `reward_scale` (set from the offline data); `termination` is a logit."""

    reward_scale: Tensor
    terminates: Tensor

    def __init__(self, obs_dim: int, action_dim: int, latent: int = 128, width: int = 256, simnorm_group: int = 8):
        super().__init__()
        if latent % simnorm_group:
            raise ValueError(f"world_model.latent must be a multiple of world_model.simnorm_group={simnorm_group}, got {latent}")
        self.encoder = mlp([obs_dim, width, latent], SimNormLinear, group=simnorm_group)
        self.z_in, self.a_in = nn.Linear(latent, width), nn.Linear(action_dim, width, bias=False)
        self.trunk = nn.Sequential(nn.LayerNorm(width), nn.SiLU(), nn.Linear(width, width), nn.LayerNorm(width), nn.SiLU())
        self.next_z = nn.Sequential(SimNormLinear(width, latent, simnorm_group))
        self.heads = nn.Linear(width, 2)                                            # reward, termination logit
        self.register_buffer("reward_scale", torch.ones(()))
        self.register_buffer("terminates", torch.ones(()))                          # 0 until there is data with a termination: the head is untrained

    def encode(self, obs: Tensor) -> Tensor:
        """(..., Do) normalised observations -> latents (..., Dz)."""
        return self.encoder(obs)

    def step(self, z: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z (..., Dz), action (..., Da) -> next latent (..., Dz), reward (...) in units of reward_scale, termination logit (...)."""
        return self.advance(self.z_in(z), action)

    def advance(self, hidden: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`step` from z_in(z), hidden (..., W): many actions that start from one latent share that product.

        Under autocast the two scalars stay in full precision: a plan is chosen by small differences of large returns.
        """
        x = self.trunk(hidden + self.a_in(action))                                  # (..., W)
        with torch.autocast(x.device.type, enabled=False):
            reward, termination = self.heads(x.to(self.heads.weight.dtype)).unbind(-1)
        return self.next_z(x), reward, termination

    def rollout(self, z: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z (B, Dz), actions (B, H, Da) -> latents (B, H+1, Dz) incl. z itself, rewards (B, H), termination logits (B, H)."""
        latents, rewards, terminations = [z], [], []
        for a in actions.unbind(1):
            z, r, c = self.step(z, a)
            latents.append(z)
            rewards.append(r)
            terminations.append(c)
        return torch.stack(latents, 1), torch.stack(rewards, 1), torch.stack(terminations, 1)
