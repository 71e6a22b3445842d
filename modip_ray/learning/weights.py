"""Weights that travel: flat vectors of an agent's parts, each with a version."""

from __future__ import annotations

import numpy as np
import torch

from modip_ray.model.agent import Agent

Newer = dict[str, tuple[int, np.ndarray]]


def load_parts(agent: Agent, parts: Newer) -> None:
    """Swap in what was pulled: "agent" first, then the newer parts over it."""
    for part in ("agent", "policy", "model"):
        if part in parts:
            agent.load_flat(parts[part][1], None if part == "agent" else part)


def flat(module: torch.nn.Module) -> np.ndarray:
    """Parameters and buffers of a module as one float32 vector."""
    return torch.cat([t.detach().reshape(-1).float() for t in module.state_dict().values()]).cpu().numpy()


@torch.no_grad()
def load_flat(module: torch.nn.Module, vector: np.ndarray) -> None:
    """Inverse of `flat`, in place."""
    at, source = 0, torch.from_numpy(np.array(vector))
    for t in module.state_dict().values():
        t.copy_(source[at:at + t.numel()].view(t.shape))
        at += t.numel()
