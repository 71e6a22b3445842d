"""Which plans deserve to be imitated: row weights of the (unchanged) denoising loss. B rows."""

from __future__ import annotations

import torch
from torch import Tensor

from modip_ray.config import Distill


def imitation_weights(cfg: Distill, online: Tensor, gain: Tensor, advantage: Tensor) -> Tensor:
    """Row weights (B,) >= 0.

    online (B,) bool: the row comes from the online phase; gain (B,): the plan's predicted, penalised gain over the policy's own proposals
    (NaN where nothing was planned); advantage (B,): realised n-step return minus V(s), in units of its own spread.

    rule "all": every row counts 1. "predicted": online rows count where gain > min_gain. "realised": rows, offline ones too, count where what
    really followed was better than V expected, advantage > min_gain. "positive": these rows count by how much better, advantage - min_gain, clipped at 20,
    mean 1 (self-imitation learning, 1806.05635): a success where V expected none counts most. "exponential": rows count exp(beta * advantage), clipped at
    20, mean 1 (advantage-weighted regression, 1910.00177).
    """
    if cfg.rule == "all":
        return torch.ones_like(advantage)
    if cfg.rule == "predicted":
        return torch.where(online, gain > cfg.min_gain, True).float()               # NaN > x is False: the policy's own actions teach nothing new
    if cfg.rule == "realised":
        return (advantage > cfg.min_gain).float()
    weight = (advantage - cfg.min_gain if cfg.rule == "positive" else (cfg.beta * advantage).exp()).clamp(0.0, 20.0)
    return weight / weight.mean().clamp(min=1e-6)
