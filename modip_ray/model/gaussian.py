"""The comparison without diffusion (policy.kind: gaussian): one MLP that gives mean and spread of a chunk, trained by maximum likelihood.

It has what acting and training ask of `DiffusionPolicy`, which takes its place in planner, learner and critic. B rows, n samples a row, H chunk length,
Da action size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from modip_ray.config import Config
from modip_ray.model.diffusion import DiffusionPolicy
from modip_ray.model.networks import ResidualMLP

LOG_STD = (-4.0, 1.0)               # least and largest logarithm of the spread


class GaussianPolicy(nn.Module):
    """p(a_{t:t+H} | s_t) = N(mean, diag std^2), actions in [-1, 1]."""

    def __init__(self, obs_dim: int, action_dim: int, horizon: int, denoising_steps: int, width: int = 256, blocks: int = 2):
        """denoising_steps: not used but in the numbers that the learner draws for a denoising loss."""
        super().__init__()
        self.horizon, self.action_dim, self.denoising_steps = horizon, action_dim, denoising_steps
        self.obs_in = nn.Sequential(nn.Linear(obs_dim, width), nn.SiLU(), nn.Linear(width, width))
        self.trunk = ResidualMLP(width, blocks)
        self.out = nn.Sequential(nn.LayerNorm(width), nn.SiLU(), nn.Linear(width, 2 * horizon * action_dim))

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """obs (B, Do) -> mean and logarithm of the spread, each (B, H, Da)."""
        hidden = self.trunk(self.obs_in(obs))
        with torch.autocast(hidden.device.type, enabled=False):                     # actions in full precision
            mean, spread = self.out(hidden.float()).unflatten(-1, (2, self.horizon, self.action_dim)).unbind(1)
        low, high = LOG_STD
        return mean.tanh(), low + (high - low) * (spread.tanh() + 1) / 2

    def loss(self, obs: Tensor, chunk: Tensor, weight: Tensor, mask: Tensor, t: Tensor, noise: Tensor, total: Tensor | None = None) -> Tensor:
        """Negative log-likelihood less its constant, mean over valid elements of weighted rows; arguments as of `DiffusionPolicy.loss`."""
        mean, log_std = self(obs)
        error = 0.5 * ((chunk - mean) / log_std.exp()).square() + log_std           # (B, H, Da)
        row_weight = weight[:, None] * mask
        total = row_weight.sum() if total is None else total
        return (error.mean(-1) * row_weight).sum() / total.clamp(min=1e-6)

    @torch.no_grad()
    def sample(self, obs: Tensor, noise: Tensor, steps: int) -> Tensor:
        """obs (B, Do), standard normal noise (B, n, H, Da) -> chunks (B, n, H, Da) in [-1, 1]; `steps` changes nothing."""
        mean, log_std = self(obs)
        return (mean[:, None] + log_std.exp()[:, None] * noise).clamp(-1, 1)

    @torch.no_grad()
    def act(self, obs: Tensor, noise: Tensor, steps: int) -> Tensor:
        """What is executed where the policy acts alone: the mean (B, H, Da)."""
        return self(obs)[0]


def make_policy(cfg: Config, inputs: int, action_dim: int, horizon: int) -> DiffusionPolicy | GaussianPolicy:
    """The policy of a configuration, for `inputs` features."""
    p = cfg.policy
    return policy_of(p.kind, inputs, action_dim, horizon, p.denoising_steps, p.width, p.blocks, p.parametrization, p.network)


def policy_of(kind: str, obs_dim: int, action_dim: int, horizon: int, denoising_steps: int, width: int, blocks: int, parametrization: str,
              network: str) -> DiffusionPolicy | GaussianPolicy:
    if kind == "gaussian":
        return GaussianPolicy(obs_dim, action_dim, horizon, denoising_steps, width, blocks)
    return DiffusionPolicy(obs_dim, action_dim, horizon, denoising_steps, width, blocks, parametrization, network)
