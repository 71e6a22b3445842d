"""Numbers guard of the updates: one whose loss or gradient is not finite, or whose gradient explodes, is skipped. Decided on the device."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

WINDOW = 100                        # gradient norms of good updates that "usual" is the median of; half of them must be there before one can explode


class DivergedError(FloatingPointError):
    """Training that does not come back from numbers that are not finite or explode; the message says what was seen and what to do."""


class UpdateGuard:
    """Judges the updates of one stream, without reading a number back to the host."""

    def __init__(self, explodes: float, device: torch.device):
        self.explodes = explodes
        self.recent = torch.empty(WINDOW, device=device)
        self.skipped = torch.zeros((), device=device)                               # in all
        self.streak = torch.zeros((), device=device)                                # in a row, up to now
        self.reset()

    def reset(self) -> None:
        """Forget what is usual."""
        self.recent.fill_(torch.inf)                                                # the median stays infinite until half of the window is known
        self.streak.zero_()

    def __call__(self, loss: Tensor, norm: Tensor, count: int) -> Tensor:
        """1.0 where update number `count`, of this loss () and gradient norm (), is to be skipped, else 0.0; a tensor () as fused optimisers take it."""
        good = loss.isfinite() & norm.isfinite() & (norm <= self.explodes * self.recent.median())
        place = self.recent[count % WINDOW]
        place.copy_(torch.where(good & (norm > 0), norm, place))                    # a batch without a row that counts says nothing of what is usual
        bad = 1 - good.float()
        self.skipped += bad
        self.streak.add_(1).mul_(bad)
        return bad


def extremes(batch: Mapping[str, np.ndarray]) -> str:
    """Least and greatest finite value of each field of a batch, and how many are not finite: "reward -1..1e+30 (2 not finite)"."""
    found = []
    for name, values in batch.items():
        finite = np.isfinite(values)
        span = f"{values[finite].min():.4g}..{values[finite].max():.4g}" if finite.any() else "nothing finite"
        found.append(f"{name} {span}" + (f" ({(~finite).sum()} not finite)" if not finite.all() else ""))
    return ", ".join(found)
