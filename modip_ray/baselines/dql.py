"""Diffusion Q-learning (Wang et al., arXiv 2208.06193; distill.q_weight): the denoising loss, and beside it Q of the actions that the policy draws.

The gradient goes through all denoising steps of an action. Offline this policy learns by the denoising loss alone, so that methods share their start.
What else makes the method is settings of the shared parts: targets that ask the policy (critic.target: policy_q, target_reduce: min_two), and acting by
the best of 50 actions (planner.kind: action_values with no iterations; baselines/parl.py). See configs/studies/rivals.yaml and docs/method.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modip_ray.model.diffusion import DiffusionPolicy
from modip_ray.model.policy_critic import PolicyCritic, asked
from modip_ray.model.world_model import WorldModel


def loss(policy: DiffusionPolicy, model: WorldModel, critic: PolicyCritic, q_weight: float, steps: int, obs: Tensor, chunk: Tensor, weight: Tensor,
         mask: Tensor, t: Tensor, noise: Tensor, total: Tensor) -> Tensor:
    """denoising loss - q_weight / H * mean Q(z, a) / mean |Q|, with a the first of a chunk drawn in so many DDIM steps. No gradient but the policy's.

    H: DQL's policies draw single actions. Here the denoising loss is a mean over a chunk of H, and Q knows the first of them, which has an H-th of it.
    Arguments behind `steps` as of `DiffusionPolicy.loss`; the draw begins with another row's noise.
    """
    denoising = policy.loss(obs, chunk, weight, mask, t, noise, total)
    action = policy.ddim(obs, noise.roll(1, 0)[:, None], steps)[:, 0, 0]           # (B, Da)
    with torch.no_grad():
        z = model.encode(obs).float()                                               # (B, Dz)
    q = asked(critic, z, action)                                                    # (E, B)
    return denoising - q_weight / policy.horizon * q.mean() / q.detach().abs().mean().clamp(min=1e-6)
