"""The critic that asks the policy, for comparison: action values Q(z, a) beside V(z), as in TD-MPC2 (arXiv 2310.16828). E members, B rows.

critic.target: policy_q    targets bootstrap from Q_target(z', a'), a' an action that the acting diffusion policy draws for the observation behind z'
critic.target: planned_q   a' is what the planner would do there (PA-RL; baselines/parl.py)
planner.tail: policy_q     a plan ends in Q(z_H, pi(z_H)). No observation belongs to a latent that was only imagined, so pi is a second diffusion
                           policy, conditioned on the latent and trained on the same rows with the same loss; it starts from no noise, so that a
                           score depends on the candidate alone. None where the acting policy takes latents itself (policy.kind: tdmpc2)
V is trained on the same targets, whichever they are: it is what the other setting, the distillation rules and the diagnostics ask.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modip_ray.config import Config
from modip_ray.model.critic import ValueEnsemble
from modip_ray.model.gaussian import make_policy
from modip_ray.model.networks import EnsembleMLP, without_gradient


def asks_policy(cfg: Config) -> bool:
    return cfg.critic.target != "value" or cfg.planner.tail == "policy_q"


def asked(critic: PolicyCritic, z: Tensor, action: Tensor) -> Tensor:
    """Q(z, a) (E, ...) in return units for who maximises it: gradients go to the action, not to Q's weights."""
    return critic.decode(without_gradient(critic.q, torch.cat([z, action], -1)))


class PolicyCritic(ValueEnsemble):
    """V as in `ValueEnsemble`; action values of the same sizes and units; and, for planner.tail: policy_q, the policy of the latent."""

    def __init__(self, cfg: Config, action_dim: int):
        c, w = cfg.critic, cfg.world_model
        super().__init__(w.latent, c.width, c.members, c.head, c.bins, c.bound, c.expectile)
        self.q = EnsembleMLP(c.members, [w.latent + action_dim, c.width, c.width, self.outputs])
        self.sampling_steps = cfg.policy.sampling_steps
        own = cfg.planner.tail == "policy_q" and cfg.policy.kind != "tdmpc2"
        self.policy = make_policy(cfg, w.latent, action_dim, w.horizon) if own else None

    def action_value(self, z: Tensor, action: Tensor) -> Tensor:
        """z (..., Dz), action (..., Da) -> (E, ...) in return units."""
        return self.decode(self.q(torch.cat([z, action], -1)))

    def action_loss(self, z: Tensor, action: Tensor, target: Tensor) -> Tensor:
        """Per-element loss (E, ...) of Q(z, a) against targets (...) in return units."""
        return self.error(self.q(torch.cat([z, action], -1)), target)

    def policy_value(self, z: Tensor) -> Tensor:
        """Q(z, pi(z)): (R, Dz) -> (E, R)."""
        start = torch.zeros(len(z), 1, self.policy.horizon, self.policy.action_dim, device=z.device)            # float32, also where z is not
        return self.action_value(z, self.policy.sample(z, start, self.sampling_steps)[:, 0, 0])
