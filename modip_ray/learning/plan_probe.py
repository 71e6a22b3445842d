"""What plans were worth: predicted against realised return, and the candidates of the search, at some decisions of evaluation episodes.

The planner does nothing more for it. Its plans are put by, and when the episodes are over some decisions are searched once more with noise of their own.
Symbols: B decisions, E critic members, N candidates, P proposals, H horizon, Da action size.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from modip_ray.learning.replay import discounted_suffix
from modip_ray.planning.planner import Plan, Planner
from modip_ray.planning.search import Noise, Search
from modip_ray.tasks.episode import Episode

DECISIONS = 128                     # of a job: 1.3 % of the rows that ten episodes of 1,000 steps plan for
MOST_BOOTSTRAP = 0.1                # decisions so near a time limit that V makes more of their realised return are left out, where there are others
SCALARS = ("plan_spread", "plan_spread_rejected", "plan_candidates_std", "plan_distance", "proposal_distance")

Probed = dict[str, list[float]]     # one value a decision
Scored = list[tuple[Tensor, Tensor]]        # candidates (B, N, H, Da) and what each critic member says of them (E, B, N)


def watched(search: Search) -> tuple[Search, Scored]:
    """The same search, and the candidates that it will score: the proposals first, then the warm start, Gaussian ones by round, last the refined plan."""
    seen: Scored = []
    observed = copy.copy(search)

    def returns(z: Tensor, actions: Tensor) -> Tensor:
        members = search.returns(z, actions)
        seen.append((actions, members))
        return members
    observed.returns = returns                                                      # type: ignore[method-assign]
    return observed, seen


class PlanProbe:
    """Sees the answers of a planner to a job's episodes, slot j running episode j, and measures when they are over."""

    def __init__(self, planner: Planner, seed: int):
        self.planner, self.cfg, self.seed = planner, planner.cfg, seed
        self.plans: dict[int, list[np.ndarray]] = {}            # by slot, (H, Da) each, raw units: what is executed, be it a plan or the policy's proposal
        self.acted: dict[int, list[bool]] = {}                  # by slot: the guard let the plan through

    def add(self, slots: np.ndarray, plan: Plan, reset: np.ndarray) -> None:
        """reset (B,) bool: the episode begins, for the second time where its environment failed."""
        for slot, sequence, gain, begins in zip(slots.tolist(), plan.plans, plan.gains.tolist(), reset.tolist(), strict=True):
            if begins:
                self.plans[slot], self.acted[slot] = [], []
            self.plans[slot].append(sequence)
            self.acted[slot].append(gain > self.cfg.guard.min_gain)

    @torch.inference_mode()
    def measure(self, episodes: Sequence[Episode]) -> Probed:
        """At up to DECISIONS decisions:

        plan_pred, plan_return : return that was predicted for what was executed, and the discounted one that followed, bootstrapped by V at a time limit
        plan_acted             : 1 where that is the refined plan, 0 where the guard had the policy's own proposal executed
        plan_spread, plan_spread_rejected : std over critic members of the gain over the policy's proposals: of the refined plan; of candidates that are no
            elites, mean
        plan_candidates_std    : std over candidates of their mean gain
        plan_distance, proposal_distance : root mean square difference (actions in -1..1) of the refined plan from the nearest proposal; of proposals from
            each other
        """
        agent, gamma, c = self.planner.agent, self.cfg.critic.gamma, self.cfg.planner.n_action_steps
        norm, device = agent.normalizer, self.planner.device
        chosen = self.choose(episodes, gamma, c)
        obs = np.stack([episodes[j].observations[k * c] for j, k in chosen])
        plans = norm.action(torch.as_tensor(np.stack([self.plans[j][k] for j, k in chosen]), device=device))                   # (B, H, Da)
        before = norm.action(torch.as_tensor(np.stack([self.plans[j][max(k - 1, 0)] for j, k in chosen]), device=device))
        warm = torch.cat([before[:, c:], before[:, -1:].expand(-1, c, -1)], 1)[:, : plans.shape[1]]
        has_warm = torch.tensor([k > 0 for _, k in chosen], device=device)
        s = norm.obs(torch.as_tensor(obs, device=device))                           # (B, Do)
        search = self.planner.search
        with search.precision():
            predicted = search.returns(agent.world_model.encode(s), plans[:, None]).mean(0)[:, 0]                              # (B,)
        followed = self.realised(episodes, gamma)
        found = {"plan_pred": predicted, "plan_return": torch.tensor([followed[j][k * c] for j, k in chosen]),
                 "plan_acted": torch.tensor([self.acted[j][k] for j, k in chosen])}
        found |= self.look_again(s, warm, has_warm)
        return {name: [round(v, 5) for v in values.float().tolist()] for name, values in found.items()}

    def choose(self, episodes: Sequence[Episode], gamma: float, c: int) -> list[tuple[int, int]]:
        """(episode, number of the decision), drawn without replacement by the seed, in order."""
        every = [(j, k) for j in sorted(self.plans) for k in range(len(self.plans[j]))]
        far = [(j, k) for j, k in every if episodes[j].terminated or gamma ** (episodes[j].length - k * c) <= MOST_BOOTSTRAP]
        pool = far or every
        drawn = np.random.default_rng(self.seed).choice(len(pool), min(DECISIONS, len(pool)), replace=False)
        return [pool[i] for i in sorted(drawn.tolist())]

    def realised(self, episodes: Sequence[Episode], gamma: float) -> list[np.ndarray]:
        """Discounted return from each step on (T+1,), for each episode."""
        agent = self.planner.agent
        last = torch.as_tensor(np.stack([e.observations[-1] for e in episodes]), device=self.planner.device)
        value = agent.critic(agent.world_model.encode(agent.normalizer.obs(last))).mean(0).cpu().numpy()                       # (episodes,)
        return [discounted_suffix(e.rewards, gamma) + (0.0 if e.terminated else v * gamma ** np.arange(e.length, -1, -1))
                for e, v in zip(episodes, value.tolist(), strict=True)]

    def look_again(self, s: Tensor, warm: Tensor, has_warm: Tensor) -> dict[str, Tensor]:
        """The search of these roots with its candidates kept: the last five of `measure`."""
        p, policy, device = self.cfg.planner, self.planner.agent.policy, self.planner.device
        rng = torch.Generator(device).manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=rng, device=device)
        noise = Noise(normal(len(s), p.proposals, policy.horizon, policy.action_dim), normal(len(s), p.iterations, p.gaussian, p.horizon, policy.action_dim))
        search, scored = watched(self.planner.search)
        search(s, noise, warm, has_warm, torch.tensor(self.planner.trust_region(), device=device))
        refined, proposals = scored[-1][0][:, 0], scored[0][0][:, : p.proposals]    # (B, H, Da), whether the guard accepts it or not; (B, P, H, Da)
        members = torch.cat([m for _, m in scored], -1)                             # (E, B, N+1), the refined plan last
        gain = members - members[..., : p.proposals].mean(-1, keepdim=True)
        spread = gain.std(0) if len(gain) > 1 else torch.full_like(gain[0], torch.nan)                                         # (B, N+1)
        scores = search.guarded_gain(members, members[..., : p.proposals].mean(-1))[:, :-1]
        no_elite = torch.ones_like(scores, dtype=torch.bool).scatter(1, scores.topk(min(p.elites, scores.shape[1])).indices, False)
        return {"plan_spread": spread[:, -1], "plan_spread_rejected": spread[:, :-1].where(no_elite, torch.nan).nanmean(1),
                "plan_candidates_std": gain[..., :-1].mean(0).std(1), **distances(refined, proposals)}


def distances(plan: Tensor, proposals: Tensor) -> dict[str, Tensor]:
    """plan (B, H, Da), proposals (B, P, H, Da) -> (B,) each, per action coordinate; nan between proposals where there is one only."""
    own, others = plan.flatten(1)[:, None], proposals.flatten(2)                    # (B, 1, H*Da), (B, P, H*Da)
    scale = own.shape[-1] ** 0.5
    between = torch.cdist(others, others) + torch.diag(torch.full((others.shape[1],), torch.inf, device=others.device))
    nearest = between.amin(2).mean(1)
    return {"plan_distance": torch.cdist(own, others).amin((1, 2)) / scale, "proposal_distance": nearest.where(nearest.isfinite(), torch.nan) / scale}


def summary(parts: Iterable[Probed]) -> dict[str, object]:
    """Of all jobs of an evaluation, for the diagnostics row: both returns by decision and whether a plan was acted on, correlation and mean difference of the
    returns, means of the rest; {} of none."""
    parts = [part for part in parts if part]
    if not parts:
        return {}
    values = {name: np.array([v for part in parts for v in part[name]]) for name in parts[0]}
    predicted, followed = values["plan_pred"], values["plan_return"]
    known = len(predicted) > 1 and predicted.std() > 0 and followed.std() > 0
    means = {name: float(values[name][np.isfinite(values[name])].mean()) if np.isfinite(values[name]).any() else None for name in SCALARS}
    return {"plan_pred": predicted, "plan_return": followed, "plan_acted": values["plan_acted"].astype(int),
            "plan_corr": float(np.corrcoef(predicted, followed)[0, 1]) if known else None,
            "plan_bias": float((predicted - followed).mean()), **means}
