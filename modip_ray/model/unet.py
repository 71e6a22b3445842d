"""1-d temporal U-Net over action chunks: the denoiser of Diffusion Policy (Chi et al., 2303.04137), after Janner et al. (2205.09991).

Symbols: B rows, n samples a row, R = B*n chunks, H chunk length, L padded length, C channels, Da action size, W width, F FiLM numbers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

MAX_DOWN = 2


def halvings(horizon: int) -> int:
    """How often a chunk is halved: at least two steps are left, so that a convolution still has something to mix; at most twice."""
    return max(0, min(MAX_DOWN, int(math.log2(horizon)) - 1))


def norm(channels: int) -> nn.GroupNorm:
    """Up to 8 groups of at least 4 channels: a group of one number would be normalised away."""
    groups = math.gcd(8, channels)
    while groups > 1 and channels // groups < 4:
        groups //= 2
    return nn.GroupNorm(groups, channels)


class FiLMBlock(nn.Module):
    """Two convolutions with a residual; scale and shift (FiLM, 1709.07871) between them say which observation and which denoising step it is."""

    def __init__(self, inputs: int, channels: int):
        super().__init__()
        self.channels = channels
        self.conv1, self.norm1 = nn.Conv1d(inputs, channels, 3, padding=1), norm(channels)
        self.conv2, self.norm2 = nn.Conv1d(channels, channels, 3, padding=1), norm(channels)
        self.skip = nn.Identity() if inputs == channels else nn.Conv1d(inputs, channels, 1)

    def forward(self, x: Tensor, film: Tensor) -> Tensor:
        """x (R, Cin, L), film (B, 2C) shared by the R/B samples of a row -> (R, C, L)."""
        h = nn.functional.silu(self.norm1(self.conv1(x)))                           # (R, C, L)
        scale, shift = film[:, None, :, None].chunk(2, 2)                           # (B, 1, C, 1) each
        h = torch.addcmul(shift, h.view(len(film), -1, *h.shape[1:]), 1 + scale).view(h.shape)
        return nn.functional.silu(self.norm2(self.conv2(h))) + self.skip(x)


class TemporalUNet(nn.Module):
    """Noisy chunks -> prediction of the same shape, for any H >= 1.

    Chunks are halved `halvings(H)` times and for that zero-padded at their end to a multiple of 2^halvings; the padding is cut off again.
    The deepest level has `width` channels, each level above half as many. Conditioning is linear in two parts, observation and denoising step,
    so each observation is embedded once, however many samples and steps follow, and each step once for all samples.
    """

    def __init__(self, action_dim: int, horizon: int, width: int, blocks: int):
        super().__init__()
        down = halvings(horizon)
        if width % 2**down:
            raise ValueError(f"policy.width must be a multiple of {2**down} for the unet with policy.horizon={horizon}, got {width}")
        if blocks < 1:
            raise ValueError(f"policy.blocks must be at least 1 for the unet, got {blocks}")
        self.horizon, self.action_dim = horizon, action_dim
        self.padding = -horizon % 2**down
        sizes = [width >> (down - i) for i in range(down + 1)]                       # channels by level, the finest first

        def level(inputs: int, channels: int) -> nn.ModuleList:
            return nn.ModuleList(FiLMBlock(inputs if i == 0 else channels, channels) for i in range(blocks))

        pairs = list(zip(sizes[:-1], sizes[1:], strict=True))
        self.down = nn.ModuleList(level(action_dim if i == 0 else sizes[i - 1], c) for i, c in enumerate(sizes[:-1]))
        self.shrink = nn.ModuleList(nn.Conv1d(c, c, 3, stride=2, padding=1) for c in sizes[:-1])
        self.middle = level(sizes[-2] if down else action_dim, width)
        self.grow = nn.ModuleList(nn.ConvTranspose1d(deep, c, 4, stride=2, padding=1) for c, deep in reversed(pairs))
        self.up = nn.ModuleList(level(2 * c, c) for c in reversed(sizes[:-1]))
        self.out = nn.Sequential(norm(sizes[0]), nn.SiLU(), nn.Conv1d(sizes[0], action_dim, 1))
        self.film_sizes = [2 * block.channels for part in (*self.down, self.middle, *self.up) for block in part]
        self.film_obs, self.film_time = (nn.Sequential(nn.SiLU(), nn.Linear(width, sum(self.film_sizes))) for _ in range(2))

    def forward(self, obs_film: Tensor, chunk: Tensor, time: Tensor) -> Tensor:
        """(R, H*Da) from obs_film (B, F) = film_obs(observation features), noisy chunks (R, H*Da), row-major, and time features (B, W) or (1, W)."""
        films = iter((obs_film + self.film_time(time)).split(self.film_sizes, 1))    # of (B, 2C)
        x = chunk.view(-1, self.horizon, self.action_dim).transpose(1, 2)            # (R, Da, H)
        x = nn.functional.pad(x, (0, self.padding))                                 # (R, Da, L)
        skips: list[Tensor] = []
        for blocks, shrink in zip(self.down, self.shrink, strict=True):
            for block in blocks:
                x = block(x, next(films))
            skips.append(x)
            x = shrink(x)                                                           # (R, C, L/2)
        for block in self.middle:
            x = block(x, next(films))
        for blocks, grow in zip(self.up, self.grow, strict=True):
            x = torch.cat([grow(x), skips.pop()], 1)                              # (R, 2C, L)
            for block in blocks:
                x = block(x, next(films))
        return self.out(x)[..., :self.horizon].transpose(1, 2).flatten(1)           # (R, H*Da)
