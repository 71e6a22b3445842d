"""The planner asked by the learner, with the weights of now. Lazy reanalyze (BMPC, 2503.18871): rows of a policy batch are planned anew and imitated in place
of what was done then; PA-RL: so are all rows, and the critic's targets ask for the planner's action (critic.target: planned_q).

BMPC plans few rows and writes the result back into the replay; here a share of every batch is planned and nothing is written back, so the replay stays
what the environments saw. B rows, H horizon of a chunk, Da action size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from modip_ray.baselines.parl import ActionSearch
from modip_ray.config import Config
from modip_ray.model.agent import Agent
from modip_ray.model.hardware import uses_bf16
from modip_ray.planning.planner import make_search, trust_region
from modip_ray.planning.search import Found, Noise


class Reanalyze:
    """Plans without a warm start, as far from the policy's proposals as the trust region of that time allows."""

    def __init__(self, cfg: Config, agent: Agent, rng: torch.Generator):
        self.cfg, self.rng, self.device = cfg, rng, agent.normalizer.obs_mean.device
        self.search = make_search(cfg, agent, uses_bf16(cfg.resources.precision, self.device))

    def compile(self, compiler: Callable[..., Any]) -> None:
        """PA-RL's climb, which its plans take most of their time for."""
        if isinstance(self.search, ActionSearch) and self.cfg.planner.iterations:
            self.search.slope = compiler(self.search.slope, "the learner")          # type: ignore[method-assign]

    @torch.no_grad()
    def __call__(self, obs: Tensor, chunk: Tensor, mask: Tensor, online: Tensor, env_steps: float) -> tuple[Tensor, Tensor, Tensor]:
        """obs (B, Do) normalised, chunk (B, H, Da), mask (B, H), online (B,) bool -> chunk and mask, with the plan where there is a new one, and where (B,).

        The first distill.reanalyze of the online rows (rows lie at random) are planned, of all rows where the planner is PA-RL's, for which a row's own
        chunk is a candidate too; a plan counts where the guard lets it through.
        """
        h, planned, improves = self.cfg.planner.horizon, torch.zeros_like(online), isinstance(self.search, ActionSearch)
        rows = (torch.ones_like(online) if improves else online).nonzero()[:, 0]
        rows = rows[:round(self.cfg.distill.reanalyze * len(rows))]
        if not len(rows):
            return chunk, mask, planned
        if improves:
            found, own = self.search.imitated(obs[rows], self.proposal_noise(len(rows)), chunk[rows, :h], self.rng)
        else:
            found, own = self.plan(obs[rows], env_steps), torch.zeros_like(rows, dtype=torch.bool)
        chunk, mask, planned[rows] = chunk.clone(), mask.clone(), found.accepted & ~own
        whole = torch.zeros_like(mask[0])
        whole[:h] = 1                                                               # a plan may be shorter than the policy's chunk
        chunk[rows, :h] = torch.where(found.accepted[:, None, None], found.plan, chunk[rows, :h])
        mask[rows] = torch.where(planned[rows, None], whole, mask[rows])            # a row's own chunk keeps its mask
        return chunk, mask, planned

    @torch.no_grad()
    def plan(self, obs: Tensor, env_steps: float) -> Found:
        """obs (B, Do) normalised."""
        p, n, action_dim = self.cfg.planner, len(obs), self.search.agent.action_dim
        noise = Noise(self.proposal_noise(n), self.noise(n, p.iterations, p.gaussian, p.horizon, action_dim))
        cold = torch.zeros(n, p.horizon, action_dim, device=self.device), torch.zeros(n, dtype=torch.bool, device=self.device)
        return self.search(obs, noise, *cold, torch.tensor(trust_region(self.cfg, env_steps), device=self.device))

    def proposal_noise(self, rows: int) -> Tensor:
        """(rows, P, chunk, Da)."""
        policy = self.search.agent.policy
        return self.noise(rows, self.cfg.planner.proposals, policy.horizon, policy.action_dim)

    def noise(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.rng, device=self.device)
