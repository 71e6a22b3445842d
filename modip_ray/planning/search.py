"""What a plan computes on the device, tensors in and tensors out: proposals -> MPPI in latent space -> terminal V -> guard.

Nothing here reads a number back to the host or draws one, so the whole of it is one graph for torch.compile (planning/compiled.py).
Symbols: B rows, P proposals, G Gaussian candidates, I iterations, N candidates, E critic members, H horizon, Do / Da / Dz sizes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from modip_ray.config import Config
from modip_ray.model.agent import Agent
from modip_ray.planning.mppi import mppi, with_start


class Noise(NamedTuple):
    """Standard normal numbers that a search uses up."""

    start: Tensor          # (B, P, Hp, Da) where the proposals' denoising starts; Hp: the policy's chunk length
    gaussian: Tensor       # (B, I, G, H, Da)


class Found(NamedTuple):
    plan: Tensor           # (B, H, Da) in -1..1; the policy's own (policy.samples) where the guard says no
    std: Tensor            # (B, H, Da) spread of the elites
    gain: Tensor           # (B,) of the refined plan over the proposals' mean, less the guard's penalty; NaN where that is not finite
    accepted: Tensor       # (B,) bool: the guard lets the refined plan through


class Search:
    """Owns no weights: `agent` is whatever module acts, and may be swapped or loaded in place between two calls.

    bf16: matrix products in bfloat16 (autocast); rewards, values and everything that compares them stay in float32.
    """

    def __init__(self, cfg: Config, agent: Agent, bf16: bool = False):
        self.cfg, self.agent, self.bf16 = cfg, agent, bf16

    def __call__(self, s: Tensor, noise: Noise, warm: Tensor, has_warm: Tensor, limits: Tensor) -> Found:
        """s (B, Do) normalised; warm (B, H, Da) previous plans, valid where has_warm (B,); limits (2,): largest std, trust (see `planner.trust_region`)."""
        with self.precision():
            return self.search(s, noise, warm, has_warm, limits)

    def precision(self) -> torch.autocast:
        return torch.autocast(self.agent.normalizer.obs_mean.device.type, torch.bfloat16, enabled=self.bf16)

    def search(self, s: Tensor, noise: Noise, warm: Tensor, has_warm: Tensor, limits: Tensor) -> Found:
        p = self.cfg.planner
        std_max, trust = limits.unbind()
        proposals = self.agent.propose(s, noise.start, p.proposal_steps)[:, :, : p.horizon]      # (B, P, H, Da)
        z = self.agent.world_model.encode(s)                                        # (B, Dz)
        low, high = (proposals.amin(1) - trust).clamp(min=-1), (proposals.amax(1) + trust).clamp(max=1)       # (B, H, Da)
        kept = with_start(proposals, warm, has_warm, low, high, wide := p.first_round == "wide")              # (B, P+1, H, Da)
        members = self.returns(z, kept)                                             # (E, B, P+1)
        reference = members[..., : p.proposals].mean(-1)                            # (E, B) what the policy would get, by each member
        result = mppi(lambda a: self.guarded_gain(self.returns(z, a), reference), kept, self.guarded_gain(members, reference), noise.gaussian,
                      low=low, high=high, n_elites=p.elites, temperature=p.temperature, std_min=p.std_min, std_max=std_max, wide=wide)
        return self.judged(z, result.mean, result.std, proposals, reference)

    def judged(self, z: Tensor, plan: Tensor, std: Tensor, proposals: Tensor, reference: Tensor) -> Found:
        """The refined plan (B, H, Da), or the mean of the first policy.samples proposals (B, P, H, Da) where its gain over `reference` (E, B) does not pass
        the guard."""
        gain = self.guarded_gain(self.returns(z, plan[:, None]), reference)[:, 0]   # (B,)
        gain = torch.where(gain.isfinite(), gain, torch.nan)                        # nothing that can be called a plan, as gains in replay have it
        accepted = gain > self.cfg.guard.min_gain                                   # the guard: else the policy's own, of planner.proposal_steps
        return Found(torch.where(accepted[:, None, None], plan, proposals[:, : self.cfg.policy.samples].mean(1)), std, gain, accepted)

    def returns(self, z: Tensor, actions: Tensor) -> Tensor:
        """Predicted return by each critic member: z (B, Dz), actions (B, N, H, Da) -> (E, B, N) in return units."""
        b, n = actions.shape[:2]
        hidden = self.agent.world_model.z_in(z).repeat_interleave(n, 0)             # (B*N, W) computed once a root
        return self.rollout(hidden, actions.flatten(0, 1)).view(-1, b, n)

    def rollout(self, hidden: Tensor, actions: Tensor) -> Tensor:
        """sum_k gamma^k r_k + gamma^H V_e(z_H), cut where the model sees a termination: z_in of the roots (R, W), actions (R, H, Da) -> (E, R)."""
        model, gamma = self.agent.world_model, self.cfg.critic.gamma
        total, weight = torch.zeros_like(actions[:, 0, 0]), torch.ones_like(actions[:, 0, 0])
        z = hidden
        for k, a in enumerate(actions.unbind(1)):                                   # (R, Da), H times
            z, reward, termination = model.advance(model.z_in(z) if k else hidden, a)
            total = total + weight * reward * model.reward_scale
            weight = weight * gamma * (1 - model.terminates * termination.sigmoid())
        return total + weight * (self.agent.tail_value(z) if self.cfg.planner.tail == "policy_q" else self.agent.critic(z))

    def guarded_gain(self, members: Tensor, reference: Tensor) -> Tensor:
        """How much better than the policy's own proposals, less the ensemble's disagreement about *that difference*.

        members (E, B, N), reference (E, B) -> (B, N). An error that all candidates of a root share (each member's own level) cancels
        in the difference; what is left is what could mislead the choice.
        """
        gain = members - reference.unsqueeze(-1)                                    # (E, B, N)
        if self.cfg.guard.value_reduce == "min":
            return gain.min(0).values
        penalty = self.cfg.guard.value_penalty
        return gain.mean(0) - penalty * gain.std(0) if penalty and len(gain) > 1 else gain.mean(0)
