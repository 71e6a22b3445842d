"""DSRL (Wagenmaker et al., arXiv 2506.15799; policy.kind: dsrl): the diffusion policy stays as it is; what is learned is the noise that it starts from.

Its variant with two critics (DSRL-NA): Q(z, a) is trained on replay as for any critic.target: policy_q; a second one, of observation and noise, follows
what Q says of the action that the noise becomes; soft actor-critic finds noise that this one values. Offline the diffusion policy learns by its denoising
loss, and until the first online update it acts with plain noise, so its BC column is the policy itself. Settings: configs/studies/rivals.yaml, docs/method.md.

Symbols: B rows, n samples a row, H chunk length, E critic members, Do / Da / Dz sizes of observation, action and latent, Dw = H * Da.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from modip_ray.config import Config
from modip_ray.model.diffusion import DiffusionPolicy
from modip_ray.model.networks import EnsembleMLP, mlp, without_gradient
from modip_ray.model.policy_critic import PolicyCritic
from modip_ray.model.world_model import WorldModel

BOUND = 1.0                         # largest noise
TARGET_ENTROPY = 0.0
TEMPERATURE = 0.005                 # at the start. Theirs falls from one return unit in ten times the updates that a run has here
LOG_STD = (-20.0, 2.0)              # limits of the logarithm of the spread before tanh


class SteeredPolicy(DiffusionPolicy):
    """A diffusion policy and, for its noise: an actor, its critic and its temperature. `steering`: 0 as long as plain noise is used, then 1."""

    def __init__(self, cfg: Config, obs_dim: int, action_dim: int):
        p = cfg.policy
        super().__init__(obs_dim, action_dim, p.horizon, p.denoising_steps, p.width, p.blocks, p.parametrization, p.network)
        size = p.horizon * action_dim
        self.actor = mlp([obs_dim, p.width, p.width, 2 * size])
        self.noise_q = EnsembleMLP(cfg.critic.members, [obs_dim + size, p.width, p.width, 1])
        self.log_temperature = nn.Parameter(torch.tensor(math.log(TEMPERATURE)))
        self.steering = nn.Parameter(torch.zeros(()), requires_grad=False)          # a parameter, so that it travels with the running average

    def steered(self, obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """obs (B, Do), standard normal noise (B, n, H, Da) -> noise that the actor draws with it (B, n, H, Da), and its log-likelihood (B, n)."""
        out = self.actor(obs)[:, None].float()                                      # (B, 1, 2 * Dw), in full precision
        mean, log_std = out.chunk(2, -1)
        log_std = log_std.clamp(*LOG_STD)
        before = mean + log_std.exp() * noise.flatten(2)                            # (B, n, Dw), before tanh
        squash = 2 * (math.log(2) - before - nn.functional.softplus(-2 * before))   # log(1 - tanh^2), without its rounding at the ends
        gaussian = -0.5 * noise.flatten(2).square() - log_std - 0.5 * math.log(2 * math.pi)
        return BOUND * before.tanh().view(noise.shape), (gaussian - squash - math.log(BOUND)).sum(-1)

    @torch.no_grad()
    def sample(self, obs: Tensor, noise: Tensor, steps: int) -> Tensor:
        """As `DiffusionPolicy.sample`, from the noise that the actor makes of `noise` once it has been trained."""
        return self.ddim(obs, torch.where(self.steering > 0, self.steered(obs, noise)[0], noise), steps)

    def steer(self, model: WorldModel, critic: PolicyCritic, steps: int, obs: Tensor, chunk: Tensor, weight: Tensor, mask: Tensor, t: Tensor, noise: Tensor,
              total: Tensor) -> Tensor:
        """The losses of noise critic, actor and temperature, added up; they share no gradient. In units of the data's return spread.

        Arguments behind `steps` as of `DiffusionPolicy.loss`, of which obs and noise are used: the noise critic's noise; the actor's draw begins with another
        row's.
        """
        with torch.no_grad():
            self.steering.fill_(1)
            action = self.ddim(obs, noise[:, None], steps)[:, 0, 0]                # (B, Da)
            worth = (critic.action_value(model.encode(obs).float(), action) - critic.shift) / critic.scale            # (E, B)
        value = self.noise_q(torch.cat([obs, noise.flatten(1)], -1)).squeeze(-1)    # (E, B)
        drawn, log_likelihood = (x[:, 0] for x in self.steered(obs, noise.roll(1, 0)[:, None]))              # (B, H, Da), (B,)
        of_drawn = without_gradient(self.noise_q, torch.cat([obs, drawn.flatten(1)], -1)).squeeze(-1)        # (E, B)
        actor = self.log_temperature.detach().exp() * log_likelihood - of_drawn.amin(0)
        temperature = -self.log_temperature * (log_likelihood.detach() + TARGET_ENTROPY)
        return (value - worth).square().mean() + actor.mean() + temperature.mean()
