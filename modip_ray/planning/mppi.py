"""Model-predictive path integral control over hybrid candidates (MODIP; MPPI after Williams et al., 1707.02342, and TD-MPC2).

Symbols: B rows, N candidates, P proposals of the diffusion policy, G Gaussian candidates, H horizon, Da action size.
`score` maps (B, N, H, Da) to (B, N); nothing here knows what it is, so the maths is tested on a known quadratic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Score = Callable[[Tensor], Tensor]


@dataclass
class MPPIResult:
    mean: Tensor          # (B, H, Da) weighted mean of the elites
    std: Tensor           # (B, H, Da) their spread, clamped
    elites: Tensor        # (B, M, H, Da)
    weights: Tensor       # (B, M) sum to 1


def elite_statistics(candidates: Tensor, scores: Tensor, n_elites: int, temperature: float, std_min: float,
                     std_max: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean, std (B, H, Da), elites (B, M, H, Da) and their weights (B, M).

    weights = softmax(temperature * (score - best) / spread), where spread is the elites' own score std: the same temperature then suits
    tasks with rewards of 0.01 and of 1000. std_max (B,) or ().
    """
    top, index = scores.topk(n_elites, dim=1)                                       # (B, M)
    elites = candidates.gather(1, index[:, :, None, None].expand(-1, -1, *candidates.shape[2:]))
    spread = top.std(1, keepdim=True).clamp(min=1e-6) if n_elites > 1 else torch.ones_like(top)
    weights = (temperature * (top - top[:, :1]) / spread).softmax(1)                # (B, M)
    w = weights[:, :, None, None]
    mean = (w * elites).sum(1)                                                      # (B, H, Da)
    std = (w * (elites - mean[:, None]).square()).sum(1).sqrt()
    std = torch.minimum(std.clamp(min=std_min), std_max.reshape(-1, 1, 1))
    return mean, std, elites, weights


def with_start(proposals: Tensor, warm: Tensor, has_warm: Tensor, low: Tensor, high: Tensor, wide: bool = False) -> Tensor:
    """The proposals (B, P, H, Da) and, last, where a search starts: the previous plan, shifted by the executed actions, warm (B, H, Da), where has_warm (B,);
    else the first proposal, or nil where `wide`. (B, P+1, H, Da)."""
    start = torch.where(has_warm[:, None, None], warm, torch.zeros_like(warm) if wide else proposals[:, 0]).clamp(low, high)          # (B, H, Da)
    return torch.cat([proposals, start[:, None]], 1)


def mppi(score: Score, kept: Tensor, kept_scores: Tensor, noise: Tensor, *, low: Tensor, high: Tensor, n_elites: int, temperature: float, std_min: float,
         std_max: Tensor, wide: bool = False) -> MPPIResult:
    """Refine a Gaussian over action sequences, starting from the policy's proposals and the previous plan.

    kept (B, P+1, H, Da) with their scores (B, P+1): from `with_start`.
    noise (B, I, G, H, Da): standard normal, for G Gaussian candidates in each of I iterations; nil of either is no refinement.
    low, high (B, H, Da): the trust region, which no candidate leaves.
    wide: the first Gaussian candidates lie std_max around the last of them (TD-MPC2); else around the elites.
    They are scored once and stay candidates in every round; only the G Gaussian candidates are new.
    """
    mean, std, elites, weights = elite_statistics(kept, kept_scores, min(n_elites, kept.shape[1]), temperature, std_min, std_max)
    rounds = noise.unbind(1) if noise.shape[2] else ()
    if wide and rounds:
        mean, std = kept[:, -1], std_max.reshape(-1, 1, 1).expand_as(std)
    for drawn in rounds:                                                            # (B, G, H, Da)
        gaussian = (mean[:, None] + std[:, None] * drawn).clamp(low[:, None], high[:, None])
        candidates = torch.cat([kept, gaussian], 1)                                 # (B, N, H, Da)
        scores = torch.cat([kept_scores, score(gaussian)], 1)                       # (B, N)
        mean, std, elites, weights = elite_statistics(candidates, scores, n_elites, temperature, std_min, std_max)
    return MPPIResult(mean, std, elites, weights)
