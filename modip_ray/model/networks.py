"""Building blocks. B rows, E ensemble members, Dz latent width."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn


class SimNormLinear(nn.Linear):
    """A linear layer with simplicial normalisation (TD-MPC2, arXiv 2310.16828, eq. 5): softmax over groups of `group` features, each sums to 1.

    Feature i belongs to group ``i % (D / group)``: a strided grouping, a permutation of the usual one. The product is computed transposed,
    features by rows: then the members of all groups of all rows lie a stride apart, and the softmax runs over whole vectors, whatever D is.
    The transposed result is a view, which the products that take it read as it is (docs/speed/batching.md).
    """

    def __init__(self, inputs: int, outputs: int, group: int = 8):
        super().__init__(inputs, outputs)
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        """(..., Din) -> (..., Dout)."""
        if torch.compiler.is_compiling():                                           # generated code is fastest row by row
            y = nn.functional.linear(x, self.weight, self.bias)
            return y.unflatten(-1, (self.group, -1)).softmax(-2).flatten(-2)
        y = torch.addmm(self.bias[:, None], self.weight, x.reshape(-1, x.shape[-1]).mT)                 # (Dout, R)
        return y.reshape(self.group, -1).softmax(0).view(y.shape).mT.reshape(*x.shape[:-1], -1)


def mlp(sizes: list[int], last: type[nn.Linear] = nn.Linear, **options: int) -> nn.Sequential:
    """Linear-LayerNorm-SiLU for every hidden layer, then a layer of class `last`."""
    layers: list[nn.Module] = []
    for i, o in zip(sizes[:-2], sizes[1:-1], strict=True):
        layers += [nn.Linear(i, o), nn.LayerNorm(o), nn.SiLU()]
    return nn.Sequential(*layers, last(sizes[-2], sizes[-1], **options))


class EnsembleMLP(nn.Module):
    """E independent MLPs as batched products: no Python loop over the members.

    The members' first layers share their input, so they are one product as wide as all of them; a single output is a sum of products,
    which for one column is faster than a matrix product, and stays in full precision under autocast.
    """

    def __init__(self, members: int, sizes: list[int]):
        super().__init__()
        self.members = members
        pairs = list(zip(sizes[:-1], sizes[1:], strict=True))
        self.weights = nn.ParameterList(nn.Parameter(torch.empty(members, i, o).uniform_(-1, 1) / math.sqrt(i)) for i, o in pairs)
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(members, 1, o)) for o in sizes[1:])
        self.norm_scales = nn.ParameterList(nn.Parameter(torch.ones(members, 1, o)) for o in sizes[1:-1])
        self.norm_shifts = nn.ParameterList(nn.Parameter(torch.zeros(members, 1, o)) for o in sizes[1:-1])

    def forward(self, x: Tensor) -> Tensor:
        """(..., Din) -> (E, ..., Dout)."""
        lead = x.shape[:-1]
        x = self.first(x.reshape(-1, x.shape[-1]))                                  # (E, R, Dout_0)
        for i in range(1, len(self.weights)):
            x = torch.addcmul(self.norm_shifts[i - 1], nn.functional.layer_norm(x, x.shape[-1:]), self.norm_scales[i - 1])
            x = nn.functional.silu(x)
            w, b = self.weights[i], self.biases[i]                                  # (E, Dout_i-1, Dout_i), (E, 1, Dout_i)
            x = torch.baddbmm(b, x, w) if w.shape[-1] > 1 else (x * w.mT).sum(-1, keepdim=True) + b
        return x.reshape(self.members, *lead, x.shape[-1])

    def first(self, x: Tensor) -> Tensor:
        """(R, Din) -> (E, R, Dout_0)."""
        w, b = self.weights[0], self.biases[0]
        wide = torch.addmm(b.flatten(), x, w.transpose(0, 1).flatten(1))            # (R, E * Dout_0)
        return wide.view(len(x), self.members, w.shape[-1]).transpose(0, 1)


class ResidualMLP(nn.Module):
    """Pre-activation residual blocks of two layers, as the state policies of DPPO use."""

    def __init__(self, width: int, blocks: int):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)) for _ in range(blocks)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def timestep_features(t: Tensor, dim: int) -> Tensor:
    """Sinusoidal features (..., dim) of denoising steps t (...)."""
    freq = torch.exp(torch.arange(dim // 2, device=t.device) * (-math.log(10000.0) / (dim // 2 - 1)))
    angle = t.float().unsqueeze(-1) * freq
    return torch.cat([angle.sin(), angle.cos()], -1)


def without_gradient(module: nn.Module, x: Tensor) -> Tensor:
    """module(x), for who maximises it: gradients go to x, not to the module's weights."""
    return torch.func.functional_call(module, {name: p.detach() for name, p in module.named_parameters()}, (x,))


@torch.no_grad()
def ema_update(target: nn.Module, source: nn.Module, rate: float) -> None:
    """target <- (1 - rate) * target + rate * source, all parameters at once."""
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), rate)


def flat_vector(tensors: Iterable[Tensor]) -> np.ndarray:
    """All tensors as one float32 vector: how weights travel."""
    return torch.cat([t.detach().reshape(-1).float() for t in tensors]).cpu().numpy()


@torch.no_grad()
def load_vector(tensors: Iterable[Tensor], vector: np.ndarray, name: str) -> None:
    """Inverse of `flat_vector`, in place. ValueError when the vector's length does not fit what `name` names."""
    tensors = list(tensors)
    size = sum(t.numel() for t in tensors)
    if vector.shape != (size,):
        raise ValueError(f"weight vector of shape {vector.shape} does not fit {name}, which holds {size} numbers: same model config on both sides?")
    source, at = torch.from_numpy(np.array(vector, np.float32)), 0                  # a copy of our own: the vector may live in shared memory
    for t in tensors:
        t.copy_(source[at:at + t.numel()].view(t.shape))
        at += t.numel()
