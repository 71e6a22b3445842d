"""State-value ensemble V(z) and its policy-independent targets. E members, B rows.

The TD target y = r + gamma * (1 - terminated) * V_target(z') (MODIP) needs no action of any policy; its n-step form
y = sum_{k<n} gamma^k r_k + gamma^n (1 - terminated) V_target(z_n) uses only what the replay holds, so it is as independent.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from modip_ray.model.networks import EnsembleMLP


def symlog(x: Tensor) -> Tensor:
    return x.sign() * x.abs().log1p()


def symexp(x: Tensor) -> Tensor:
    return x.sign() * x.abs().expm1()


def two_hot(x: Tensor, bins: Tensor) -> Tensor:
    """Spread x (...) over its two neighbouring bins: (..., n_bins), rows sum to 1 and have expectation x (x clipped to the bins' range)."""
    x = x.clamp(bins[0], bins[-1])
    pos = (x - bins[0]) / (bins[-1] - bins[0]) * (len(bins) - 1)                    # bins are evenly spaced
    low = pos.floor().clamp(max=len(bins) - 2).long()
    frac = (pos - low).clamp(0, 1).unsqueeze(-1)
    out = torch.zeros(*x.shape, len(bins), dtype=x.dtype, device=x.device)
    return out.scatter(-1, low.unsqueeze(-1), 1 - frac).scatter(-1, low.unsqueeze(-1) + 1, frac)


def td_target(n_step_return: Tensor, discount: Tensor, next_value: Tensor) -> Tensor:
    """y = n_step_return + discount * V_target(z_n). `discount` is gamma^n, or 0 where the episode terminated within the n steps.

    A time limit does not zero the discount: the value behind it is bootstrapped from the true last observation.
    """
    return n_step_return + discount * next_value


class ValueEnsemble(nn.Module):
    """E value heads on the latent. Outputs are in return units: raw = shift + scale * head; shift and scale come from the offline returns.

    head "regression": a scalar with an (expectile) squared loss. head "two_hot": `bins` logits over symlog space [-bound, bound].
    """

    shift: Tensor
    scale: Tensor
    bins: Tensor

    def __init__(self, latent: int, width: int = 128, members: int = 5, head: str = "regression", bins: int = 101, bound: float = 10.0, expectile: float = 0.5):
        super().__init__()
        if head not in ("regression", "two_hot"):
            raise ValueError(f"critic.head must be 'regression' or 'two_hot', got {head!r}")
        self.head, self.expectile, self.members = head, expectile, members
        self.outputs = 1 if head == "regression" else bins
        self.net = EnsembleMLP(members, [latent, width, width, self.outputs])
        self.register_buffer("shift", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("bins", torch.linspace(-bound, bound, bins))

    def forward(self, z: Tensor) -> Tensor:
        """(..., Dz) -> (E, ...) values in return units."""
        return self.decode(self.net(z))

    def loss(self, z: Tensor, target: Tensor) -> Tensor:
        """Per-element loss (E, ...) of V(z) against targets (...) in return units."""
        return self.error(self.net(z), target)

    def decode(self, out: Tensor) -> Tensor:
        """What a head says (E, ..., outputs), in return units (E, ...)."""
        if self.head == "regression":
            return self.shift + self.scale * out.squeeze(-1)
        return symexp((out.float().softmax(-1) * self.bins).sum(-1))             # values stay float32, also where products are bf16

    def error(self, out: Tensor, target: Tensor) -> Tensor:
        """Per-element loss (E, ...) of what a head says (E, ..., outputs) against targets (...) in return units."""
        if self.head == "two_hot":
            hot = two_hot(symlog(target), self.bins)                                # (..., n_bins)
            return -(hot * out.float().log_softmax(-1)).sum(-1)
        error = (target - self.shift) / self.scale - out.squeeze(-1)                # (E, ...)
        weight = torch.where(error > 0, self.expectile, 1 - self.expectile) * 2     # IQL's expectile (2110.06169, eq. 5); 0.5 is the mean
        return weight * error.square()
