"""TD-MPC2's policy prior (Hansen et al., arXiv 2310.16828; policy.kind: tdmpc2): a Gaussian of the latent that is trained to maximise Q.

What else makes the method is settings of the shared parts: configs/studies/rivals.yaml, explained in docs/method.md. The policy reads encoder, dynamics
and Q, which the model's updates train; under Ray the policy learner takes them from the weight store every planner.weights_every_s, so there they lag
behind the model learner by that much. Serially they are the newest.

Symbols: B rows, n samples a row, H chunk length, E critic members, Dz / Da sizes of latent and action.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from modip_ray.config import Config
from modip_ray.model.networks import mlp
from modip_ray.model.policy_critic import PolicyCritic, asked
from modip_ray.model.world_model import WorldModel

LOG_STD = (-10.0, 2.0)              # least and largest logarithm of the spread before tanh
INITIAL = 0.02                      # spread of the output layer's first weights: the first actions are near nil
PERCENTILES = (0.05, 0.95)          # what Q is scaled by is the distance between them


class LatentPolicy(nn.Module):
    """pi(a | z): tanh of N(mean, diag std^2). `scale`: running spread of Q, as return units, that its objective is divided by."""

    scale: Tensor
    denoising_steps = 1             # nothing is denoised

    def __init__(self, cfg: Config, action_dim: int):
        super().__init__()
        p, w = cfg.policy, cfg.world_model
        self.horizon, self.action_dim = p.horizon, action_dim
        self.entropy, self.rho, self.tau = p.entropy, w.rho, cfg.critic.tau
        self.net = mlp([w.latent, p.width, p.width, 2 * action_dim])
        nn.init.normal_(self.net[-1].weight, std=INITIAL)
        nn.init.zeros_(self.net[-1].bias)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """z (..., Dz) -> mean before tanh and logarithm of the spread, each (..., Da)."""
        out = self.net(z).float()                                                   # actions in full precision
        mean, spread = out.chunk(2, -1)
        low, high = LOG_STD
        return mean, low + (high - low) * (spread.tanh() + 1) / 2

    def mean(self, z: Tensor) -> Tensor:
        """(..., Dz) -> (..., Da) in -1..1, without noise."""
        return self(z)[0].tanh()

    @torch.no_grad()
    def unroll(self, model: WorldModel, z: Tensor, noise: Tensor) -> Tensor:
        """Actions along the latents that they lead to: z (B, Dz), standard normal noise (B, n, H, Da) -> (B, n, H, Da) in -1..1."""
        actions: list[Tensor] = []
        z = z.repeat_interleave(noise.shape[1], 0)                                  # (B*n, Dz)
        for eps in noise.flatten(0, 1).unbind(1):                                   # (B*n, Da), H times
            z = model.step(z, actions[-1])[0] if actions else z
            mean, log_std = self(z)
            actions.append((mean + log_std.exp() * eps).tanh())
        return torch.stack(actions, 1).view(noise.shape)

    def loss(self, model: WorldModel, critic: PolicyCritic, obs: Tensor, chunk: Tensor, weight: Tensor, mask: Tensor, t: Tensor, noise: Tensor,
             total: Tensor) -> Tensor:
        """-(Q(z, a) / scale + entropy bonus) with a ~ pi(z), mean over the valid latents of a rollout along the replay's actions, step k weighted rho^k.

        Arguments behind `critic` as of `DiffusionPolicy.loss`; t is not used. No gradient but the policy's; `scale` moves first.
        The bonus is on the Gaussian before tanh, times Da: what TD-MPC2's "scaled entropy" comes to.
        """
        with torch.no_grad():
            z = model.rollout(model.encode(obs), chunk)[0][:, :-1].float()         # (B, H, Dz)
        mean, log_std = self(z)                                                     # (B, H, Da)
        action = (mean + log_std.exp() * noise).tanh()
        q = asked(critic, z, action).mean(0)                                        # (B, H)
        self.follow(q[:, 0].detach())
        entropy = self.action_dim * (log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)        # (B, H)
        rho = self.rho ** torch.arange(q.shape[1], device=q.device)                 # (H,)
        return -((q / self.scale + self.entropy * entropy) * rho * weight[:, None] * mask).sum() / total.clamp(min=1e-6)

    @torch.no_grad()
    def follow(self, q: Tensor) -> None:
        """Move `scale` by critic.tau towards the distance of the percentiles of q (B,), at least 1."""
        low, high = torch.quantile(q.float(), torch.tensor(PERCENTILES, device=q.device))
        self.scale.lerp_((high - low).clamp(min=1), self.tau)
