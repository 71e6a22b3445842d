"""Diffusion policy over action chunks: DDPM training (Ho et al., 2006.11239), DDIM sampling (Song et al., 2010.02502).

Symbols: B rows, n samples a row, H chunk length, Da action size, K denoising steps. Actions live in [-1, 1].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from modip_ray.model.networks import ResidualMLP, timestep_features
from modip_ray.model.unet import TemporalUNet

TIME_DIM = 32


def cosine_alpha_bar(steps: int) -> Tensor:
    """Cumulative signal level alpha_bar (K,) of the cosine schedule (Nichol & Dhariwal, 2102.09672, eq. 17); betas clipped at 0.999."""
    f = torch.cos((torch.arange(steps + 1, dtype=torch.float64) / steps + 0.008) / 1.008 * math.pi / 2) ** 2
    betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    return torch.cumprod(1 - betas, 0).float()


def ddim_timesteps(train_steps: int, steps: int) -> list[int]:
    """`steps` of the K training steps, from the noisiest down to 0, evenly spread."""
    if not 1 <= steps <= train_steps:
        raise ValueError(f"DDIM steps must lie in 1..{train_steps} (policy.denoising_steps), got {steps}")
    if steps == 1:
        return [train_steps - 1]
    return [round(i * (train_steps - 1) / (steps - 1)) for i in range(steps)][::-1]


class DiffusionPolicy(nn.Module):
    """p(a_{t:t+H} | s_t) as a denoiser. `parametrization` says what the network predicts: the noise ("eps") or the clean chunk ("sample").

    `network`: a residual MLP on the flat chunk ("mlp"; `blocks` in all), or a temporal U-Net ("unet"; `blocks` a level).
    """

    alpha_bar: Tensor
    time_features: Tensor

    def __init__(self, obs_dim: int, action_dim: int, horizon: int, denoising_steps: int = 20, width: int = 256, blocks: int = 2,
                 parametrization: str = "sample", network: str = "mlp"):
        super().__init__()
        if parametrization not in ("eps", "sample"):
            raise ValueError(f"policy.parametrization must be 'eps' or 'sample', got {parametrization!r}")
        if network not in ("mlp", "unet"):
            raise ValueError(f"policy.network must be 'mlp' or 'unet', got {network!r}")
        self.horizon, self.action_dim, self.denoising_steps, self.parametrization = horizon, action_dim, denoising_steps, parametrization
        self.network = network
        self.register_buffer("alpha_bar", cosine_alpha_bar(denoising_steps))        # (K,)
        self.register_buffer("time_features", timestep_features(torch.arange(denoising_steps), TIME_DIM), persistent=False)     # (K, TIME_DIM)
        self.obs_in = nn.Sequential(nn.Linear(obs_dim, width), nn.SiLU(), nn.Linear(width, width))
        if network == "mlp":                                                        # in this order: seeds and weight vectors depend on it
            self.chunk_in = nn.Linear(horizon * action_dim, width)
        self.time_in = nn.Sequential(nn.Linear(TIME_DIM, width), nn.SiLU(), nn.Linear(width, width))
        if network == "mlp":
            self.trunk = ResidualMLP(width, blocks)
            self.out = nn.Sequential(nn.LayerNorm(width), nn.SiLU(), nn.Linear(width, horizon * action_dim))
        else:
            self.unet = TemporalUNet(action_dim, horizon, width, blocks)

    def embed(self, obs: Tensor) -> Tensor:
        """What denoise needs to know of obs (B, Do), shared by a row's samples: (B, W) for the MLP, (B, F) for the U-Net."""
        features = self.obs_in(obs)                                                 # (B, W)
        return features if self.network == "mlp" else self.unet.film_obs(features)

    def embed_time(self, t: Tensor) -> Tensor:
        """(R, W) for steps t (R,). Where there are more rows than the K steps, each step is embedded once."""
        if len(t) <= self.denoising_steps:
            return self.time_in(self.time_features[t])
        return self.time_in(self.time_features)[t]

    def denoise(self, obs_features: Tensor, noisy: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Predictions of (clean chunk, noise), each (R, H*Da), from embed's features (B, .), noisy chunks (R, H*Da), the R/B samples of a row
        one after the other, and steps t (1,) or (B,)."""
        time = self.embed_time(t)                                                   # (B, W) or (1, W)
        if self.network == "mlp":
            chunks = self.chunk_in(noisy).view(len(obs_features), -1, obs_features.shape[-1])       # (B, R/B, W)
            hidden = self.trunk((chunks + (obs_features + time)[:, None]).flatten(0, 1))              # (R, W)
            with torch.autocast(hidden.device.type, enabled=False):                 # actions in full precision
                pred = self.out(hidden.to(noisy.dtype))                             # (R, H*Da)
        else:
            pred = self.unet(obs_features, noisy, time).to(noisy.dtype)             # (R, H*Da)
        signal = self.alpha_bar[t].sqrt().unsqueeze(-1)                             # (R, 1)
        sigma = (1 - self.alpha_bar[t]).sqrt().unsqueeze(-1)
        if self.parametrization == "eps":
            return (noisy - sigma * pred) / signal, pred
        return pred, (noisy - signal * pred) / sigma

    def loss(self, obs: Tensor, chunk: Tensor, weight: Tensor, mask: Tensor, t: Tensor, noise: Tensor, total: Tensor | None = None) -> Tensor:
        """The denoising loss, mean over valid elements of weighted rows.

        obs (B, Do), chunk (B, H, Da), weight (B,) row weights, mask (B, H) valid chunk steps, t (B,) steps in 0..K-1, noise (B, H, Da);
        total (): what the weighted sum is divided by (None: the weights of these rows).
        """
        flat, eps = chunk.flatten(1), noise.flatten(1)                              # (B, H*Da)
        signal = self.alpha_bar[t].sqrt().unsqueeze(-1)
        sigma = (1 - self.alpha_bar[t]).sqrt().unsqueeze(-1)
        clean_pred, eps_pred = self.denoise(self.embed(obs), signal * flat + sigma * eps, t)
        error = (eps_pred - eps if self.parametrization == "eps" else clean_pred - flat).square().view_as(chunk)   # (B, H, Da)
        row_weight = weight[:, None] * mask                                         # (B, H)
        total = row_weight.sum() if total is None else total
        return (error.mean(-1) * row_weight).sum() / total.clamp(min=1e-6)

    @torch.no_grad()
    def sample(self, obs: Tensor, noise: Tensor, steps: int) -> Tensor:
        """Deterministic DDIM: obs (B, Do), start noise (B, n, H, Da) -> chunks (B, n, H, Da) in [-1, 1]."""
        return self.ddim(obs, noise, steps)

    def ddim(self, obs: Tensor, noise: Tensor, steps: int) -> Tensor:
        """As `sample`, with gradients through every step.

        The observation is embedded once per row, however many samples and steps follow.
        """
        b, n = noise.shape[:2]
        features = self.embed(obs)
        x = noise.reshape(b * n, -1)                                                # (B*n, H*Da)
        times = ddim_timesteps(self.denoising_steps, steps)
        for t, t_next in zip(times, [*times[1:], -1], strict=True):
            clean, _ = self.denoise(features, x, torch.full((1,), t, device=x.device))
            clean = clean.clamp(-1, 1)
            if t_next < 0:
                x = clean
                break
            ab, ab_next = self.alpha_bar[t], self.alpha_bar[t_next]
            eps = (x - ab.sqrt() * clean) / (1 - ab).sqrt()
            x = ab_next.sqrt() * clean + (1 - ab_next).sqrt() * eps
        return x.view(b, n, self.horizon, self.action_dim)

    def act(self, obs: Tensor, noise: Tensor, steps: int) -> Tensor:
        """What is executed where the policy acts alone: the mean of a row's n samples, from noise (B, n, H, Da), as (B, H, Da)."""
        return self.sample(obs, noise, steps).mean(1)
