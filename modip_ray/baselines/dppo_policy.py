"""DPPO's policy and its losses (Ren et al., arXiv 2409.00588): a diffusion policy whose last denoising steps are trained. No environments, no state of a run.

Symbols: T chunks of a rollout, N environments, B and R rows, H chunk length, Da action size, C = H * Da, K denoising steps, F of them trained.
State i of a chain, 0..F, is what denoising step F-1-i starts from; the last one is the chunk.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from modip_ray.config.fields import DPPO
from modip_ray.model.diffusion import DiffusionPolicy

NOISE_CLIP = 3.0                    # of the standard normal noise of a denoising step
LOG_ROOT_TAU = 0.5 * math.log(2 * math.pi)


class TunedPolicy(DiffusionPolicy):
    """The BC policy for the first denoising steps, and a copy of it that is trained for the last `steps`; it acts as any diffusion policy does.

    min_std: least deviation of a transition, in sampling and in the likelihood.
    """

    mean_clean: Tensor
    mean_noisy: Tensor
    std: Tensor

    def __init__(self, bc: DiffusionPolicy, steps: int, min_std: float):
        nn.Module.__init__(self)
        self.horizon, self.action_dim, self.denoising_steps, self.parametrization = bc.horizon, bc.action_dim, bc.denoising_steps, bc.parametrization
        self.network, self.steps = bc.network, steps
        self.bc, self.tuned = copy.deepcopy(bc).requires_grad_(False), copy.deepcopy(bc)
        mean_clean, mean_noisy, std = ddpm_posterior(bc.alpha_bar)
        for name, value in {"alpha_bar": bc.alpha_bar.clone(), "mean_clean": mean_clean, "mean_noisy": mean_noisy, "std": std.clamp(min=min_std)}.items():
            self.register_buffer(name, value, persistent=False)

    def embed(self, obs: Tensor) -> Tensor:
        """(B, Do) -> (B, 2 W): for the frozen network, and for the trained one."""
        return torch.cat([self.bc.embed(obs), self.tuned.embed(obs)], -1)

    def denoise(self, obs_features: Tensor, noisy: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """As of DiffusionPolicy, at one step t (1,) for all rows."""
        bc, tuned = obs_features.chunk(2, -1)
        return self.tuned.denoise(tuned, noisy, t) if int(t) < self.steps else self.bc.denoise(bc, noisy, t)

    def mean(self, clean: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        """Mean of the DDPM transition from `noisy` (R, C) at t (1,) or (R,), given the predicted clean chunk (R, C)."""
        return self.mean_clean[t][:, None] * clean.clamp(-1, 1) + self.mean_noisy[t][:, None] * noisy

    @torch.no_grad()
    def chain(self, obs: Tensor, rng: torch.Generator) -> Tensor:
        """Draw chunks by DDPM: obs (B, Do) -> chains (B, F+1, C)."""
        features, states = self.embed(obs), []
        x = torch.randn(len(obs), self.horizon * self.action_dim, generator=rng, device=obs.device)
        for step in reversed(range(self.denoising_steps)):
            if step < self.steps:
                states.append(x)
            t = torch.tensor([step], device=obs.device)
            clean, _ = self.denoise(features, x, t)
            noise = torch.randn(x.shape, generator=rng, device=obs.device).clamp(-NOISE_CLIP, NOISE_CLIP)
            x = self.mean(clean, x, t) + self.std[t] * noise                        # (B, C)
        return torch.stack([*states, x], 1)

    def log_prob(self, obs: Tensor, noisy: Tensor, less: Tensor, t: Tensor) -> Tensor:
        """Log-likelihood (R, H, Da) of each number of `less` (R, C), drawn from `noisy` (R, C) at trained steps t (R,), for obs (R, Do)."""
        clean, _ = self.tuned.denoise(self.tuned.embed(obs), noisy, t)
        std = self.std[t][:, None]                                                  # (R, 1)
        log_prob = -0.5 * ((less - self.mean(clean, noisy, t)) / std).square() - std.log() - LOG_ROOT_TAU
        return log_prob.view(-1, self.horizon, self.action_dim)


def ddpm_posterior(alpha_bar: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Factors of the clean and of the noisy chunk in the transition's mean, and its deviation, each (K,) (Ho et al., 2006.11239, eq. 7)."""
    before = torch.cat([torch.ones_like(alpha_bar[:1]), alpha_bar[:-1]])
    beta = 1 - alpha_bar / before
    return beta * before.sqrt() / (1 - alpha_bar), (1 - before) * (1 - beta).sqrt() / (1 - alpha_bar), (beta * (1 - before) / (1 - alpha_bar)).sqrt()


def gae(rewards: Tensor, values: Tensor, next_values: Tensor, terminated: Tensor, ended: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantages (Schulman et al., 1506.02438), all (T, N). A time limit (ended, not terminated) is bootstrapped by the value of the episode's
    true last observation; no advantage flows over an episode's end. gamma: of a whole chunk."""
    delta = rewards + gamma * (1 - terminated) * next_values - values
    advantages, after = torch.zeros_like(delta), torch.zeros_like(delta[0])
    for t in reversed(range(len(delta))):
        after = delta[t] + gamma * lam * (1 - ended[t]) * after
        advantages[t] = after
    return advantages


def clip_range(cfg: DPPO, i: Tensor) -> Tensor:
    """The ratio's clip range (R,) for state i (R,) of a chain: from clip_base at the first trained step to clip at the last, growing exponentially."""
    if cfg.denoising_steps == 1:
        return torch.full(i.shape, cfg.clip, device=i.device)
    share = (cfg.clip_rate * i / (cfg.denoising_steps - 1)).expm1() / math.expm1(cfg.clip_rate)
    return cfg.clip_base + (cfg.clip - cfg.clip_base) * share


def policy_loss(cfg: DPPO, log_ratio: Tensor, advantages: Tensor, i: Tensor) -> Tensor:
    """PPO's clipped loss () of log-ratios (R,), advantages (R,) and states i (R,): advantages normalised in the batch, earlier denoising steps discounted."""
    a = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    a = a * cfg.denoising_gamma ** (cfg.denoising_steps - 1 - i)
    ratio, clip = log_ratio.exp(), clip_range(cfg, i)
    return -torch.minimum(a * ratio, a * torch.clamp(ratio, 1 - clip, 1 + clip)).mean()
