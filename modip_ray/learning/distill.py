"""Which plans deserve to be imitated: row weights of the (unchanged) denoising loss. B rows."""

from __future__ import annotations

import torch
from torch import Tensor

from modip_ray.config import Config


def imitation_weights(cfg: Config, online: Tensor, gain: Tensor, advantage: Tensor) -> Tensor:
    """Row weights (B,) >= 0.

    online (B,) bool: the row comes from the online phase; gain (B,): the plan's predicted, penalised gain over the policy's own proposals
    (NaN where nothing was planned); advantage (B,): realised n-step return minus V(s), in units of its own spread.

    rule "all": every row counts 1. "predicted": online rows count where the plan was executed (guard.min_gain) and gain > min_gain. "realised": rows, offline
    ones too, count where what really followed was better than V expected, advantage > min_gain. "positive": these rows count by how much better,
    advantage - min_gain, clipped at 20, mean 1 (self-imitation learning, 1806.05635): a success where V expected none counts most. "exponential": rows count
    exp(beta * advantage), clipped at 20, mean 1 (advantage-weighted regression, 1910.00177).
    """
    d = cfg.distill
    if d.rule == "all":
        return torch.ones_like(advantage)
    if d.rule == "predicted":                                                       # the policy's own actions teach nothing new (NaN > x is False)
        return torch.where(online, gain > max(d.min_gain, cfg.guard.min_gain), True).float()
    if d.rule == "realised":
        return (advantage > d.min_gain).float()
    weight = (advantage - d.min_gain if d.rule == "positive" else (d.beta * advantage).exp()).clamp(0.0, 20.0)
    return weight / weight.mean().clamp(min=1e-6)


def share_of_plans(cfg: Config, online: Tensor, gain: Tensor, weight: Tensor) -> Tensor:
    """Share () of the accepted plans among the rows (B,) that are imitated; NaN where there is none."""
    accepted = online & (gain > cfg.guard.min_gain)
    return ((weight > 0) & accepted).sum() / accepted.sum()
