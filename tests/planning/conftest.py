import pytest
import torch

from modip_ray.config import load
from modip_ray.model.agent import Agent
from modip_ray.planning.planner import Planner

TINY = ["policy.width=16", "policy.blocks=1", "policy.horizon=4", "policy.n_action_steps=2", "policy.denoising_steps=8", "policy.sampling_steps=2",
        "world_model.latent=16", "world_model.width=16", "critic.width=8", "critic.members=3", "critic.gamma=0.9",
        "planner.horizon=3", "planner.n_action_steps=1", "planner.proposals=6", "planner.gaussian=8", "planner.elites=4", "planner.iterations=2",
        "planner.proposal_steps=2", "planner.temperature=1.0", "planner.std_min=0.05",
        "guard.value_penalty=1.0", "guard.value_reduce=mean", "guard.min_gain=0.0",
        "guard.std_max=0.3", "guard.std_max_final=0.5", "guard.widen_steps=1000"]


@pytest.fixture
def make_planner():
    """A small untrained planner: observations (3,), actions (2,)."""
    def make(*overrides: str, seed: int = 0) -> Planner:
        cfg = load(overrides=[*TINY, *overrides])
        torch.manual_seed(0)
        return Planner(cfg, Agent(cfg, 3, 2), seed)
    return make
