"""PA-RL's action optimisation (Mark et al., arXiv 2412.06685; planner.kind: action_values): the policy's actions, improved by Q instead of planned.

Of planner.proposals actions that the policy draws, the planner.elites best by Q (global optimisation) climb Q's gradient for planner.iterations steps of
planner.step_size (local optimisation), and the best of them is executed. What else makes the method is settings of the shared parts: the policy imitates
such actions with its unchanged denoising loss (distill.reanalyze: 1), the critic's targets ask for them (critic.target: planned_q). With no iterations
it is how DQL acts. See configs/studies/rivals.yaml and docs/method.md.

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
        p = self.cfg.planner
        proposals = self.agent.propose(s, noise.start, self.cfg.policy.sampling_steps)[:, :, : p.horizon]       # (B, P, H, Da), as the policy itself acts
        z = self.agent.world_model.encode(s).float()                                # (B, Dz)
        members = self.returns(z, proposals)                                        # (E, B, P)
        best = members.mean(0).topk(p.elites, -1).indices[..., None, None].expand(-1, -1, *proposals.shape[2:])
        kept = proposals.gather(1, best)                                            # (B, M, H, Da)
        kept = torch.cat([self.climb(z, kept[:, :, 0])[:, :, None], kept[:, :, 1:]], 2)
        top = self.returns(z, kept).mean(0).argmax(-1)                              # (B,)
        plan = kept[torch.arange(len(s), device=s.device), top]                     # (B, H, Da)
        return self.judged(z, plan, kept.std(1, correction=0), proposals, members.mean(-1))

    def returns(self, z: Tensor, actions: Tensor) -> Tensor:
        """Q(z, first action) by each member: z (B, Dz), actions (B, N, H, Da) -> (E, B, N) in return units."""
        return self.q(z, actions[:, :, 0])

    def q(self, z: Tensor, actions: Tensor) -> Tensor:
        """z (B, Dz), actions (B, N, Da) -> (E, B, N)."""
        return self.agent.critic.action_value(z[:, None].expand(-1, actions.shape[1], -1), actions)

    def climb(self, z: Tensor, actions: Tensor) -> Tensor:
        """Gradient ascent on the members' mean, in units of the data's return spread: z (B, Dz), actions (B, M, Da) in -1..1, where they stay."""
        with torch.inference_mode(False), torch.enable_grad():                      # planners run in inference mode
            z, actions = z.clone(), actions.clone()
            for _ in range(self.cfg.planner.iterations):
                actions = actions.detach().requires_grad_()
                gradient, = torch.autograd.grad(self.q(z, actions).mean(0).sum() / self.agent.critic.scale, actions)
                actions = (actions + self.cfg.planner.step_size * gradient).clamp(-1, 1)
            return actions.detach()
