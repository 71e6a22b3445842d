"""Weights that travel: flat vectors of an agent's parts, each with a version."""

from __future__ import annotations

import numpy as np

from modip_ray.model.agent import Agent

Newer = dict[str, tuple[int, np.ndarray]]


def load_parts(agent: Agent, parts: Newer) -> None:
    """Swap in what was pulled: "agent" first, then the newer parts over it."""
    for part in ("agent", "policy", "model"):
        if part in parts:
            agent.load_flat(parts[part][1], None if part == "agent" else part)
