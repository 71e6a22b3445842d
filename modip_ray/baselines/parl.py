"""PA-RL's action optimisation (Mark et al., arXiv 2412.06685; planner.kind: action_values): the policy's actions, improved by Q instead of planned.

Of planner.proposals actions that the policy draws, the planner.elites best by Q (global optimisation) climb Q's gradient for planner.iterations steps of
planner.step_size (local optimisation), and the best of them is executed. What else makes the method is settings of the shared parts: the policy imitates
such actions, drawn by Q, with its unchanged denoising loss (distill.reanalyze: 1), the critic's targets ask for the best (critic.target: planned_q). With no
iterations it is how DQL acts. See configs/studies/rivals.yaml and docs/method.md.

Symbols: B rows, P proposals, M elites, E critic members, H horizon, Dz / Da sizes of latent and action.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modip_ray.planning.search import Found, Noise, Search


class ActionSearch(Search):
    """No model is rolled out: a candidate's return is Q of its first action. The guard has its say as about plans."""

    def search(self, s: Tensor, noise: Noise, warm: Tensor, has_warm: Tensor, limits: Tensor) -> Found:
        """As `Search.search`; warm, has_warm, limits and noise.gaussian are not used."""
        z, proposals, members, kept = self.drawn(s, noise.start)
        kept = self.climbed(z, kept)
        return self.taken(z, kept, self.returns(z, kept).mean(0).argmax(-1), proposals, members)

    def imitated(self, s: Tensor, start: Tensor, own: Tensor, rng: torch.Generator) -> tuple[Found, Tensor]:
        """What the policy is to imitate, and where (B,) that is its row's own chunk, own (B, H, Da), which climbs in place of the worst of those kept.

        One of them is drawn by softmax of planner.temperature * Q: the best one each time would leave the policy with a single action.
        """
        with self.precision():
            z, proposals, members, kept = self.drawn(s, start)
            kept = self.climbed(z, torch.cat([kept[:, :-1], own[:, None]], 1))      # best first
            logits = self.cfg.planner.temperature * self.returns(z, kept).mean(0) / self.agent.critic.scale          # (B, M)
            index = (logits - torch.empty_like(logits).exponential_(generator=rng).log()).argmax(-1)        # drawn; one that is NaN, if any: the guard says no
            return self.taken(z, kept, index, proposals, members), index == kept.shape[1] - 1

    def drawn(self, s: Tensor, start: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Latents (B, Dz), the policy's chunks as it acts by itself (B, P, H, Da), what members say of them (E, B, P), the best M (B, M, H, Da), best first."""
        p = self.cfg.planner
        proposals = self.agent.propose(s, start, self.cfg.policy.sampling_steps)[:, :, : p.horizon]
        z = self.agent.world_model.encode(s).float()
        members = self.returns(z, proposals)
        best = members.mean(0).topk(p.elites, -1).indices[..., None, None].expand(-1, -1, *proposals.shape[2:])
        return z, proposals, members, proposals.gather(1, best)

    def climbed(self, z: Tensor, chunks: Tensor) -> Tensor:
        """Chunks (B, M, H, Da) with their first actions improved; the others are what the policy goes on with."""
        return torch.cat([self.climb(z, chunks[:, :, 0])[:, :, None], chunks[:, :, 1:]], 2)

    def taken(self, z: Tensor, kept: Tensor, index: Tensor, proposals: Tensor, members: Tensor) -> Found:
        """The one of kept (B, M, H, Da) that index (B,) names, if the guard agrees."""
        plan = kept[torch.arange(len(z), device=z.device), index]                   # (B, H, Da)
        return self.judged(z, plan, kept.std(1, correction=0), proposals, members.mean(-1))

    def returns(self, z: Tensor, actions: Tensor) -> Tensor:
        """Q(z, first action) by each member: z (B, Dz), actions (B, N, H, Da) -> (E, B, N) in return units."""
        return self.q(z, actions[:, :, 0])

    def q(self, z: Tensor, actions: Tensor) -> Tensor:
        """z (B, Dz), actions (B, N, Da) -> (E, B, N)."""
        return self.agent.critic.action_value(z[:, None].expand(-1, actions.shape[1], -1), actions)

    def climb(self, z: Tensor, actions: Tensor) -> Tensor:
        """Gradient ascent on the members' mean, in units of the data's return spread: z (B, Dz), actions (B, M, Da) in -1..1, where they stay."""
        with torch.inference_mode(False), torch.no_grad():                          # planners run in inference mode, which has no gradients
            z, actions = z.clone(), actions.clone()
            for _ in range(self.cfg.planner.iterations):
                actions = (actions + self.cfg.planner.step_size * self.slope(z, actions)).clamp(-1, 1)
            return actions

    def slope(self, z: Tensor, actions: Tensor) -> Tensor:
        """Of that mean, by the actions: z (B, Dz), actions (B, M, Da) -> (B, M, Da). The learner compiles it: most of what a plan takes."""
        return torch.func.grad(lambda a: self.q(z, a).mean(0).sum() / self.agent.critic.scale)(actions)
