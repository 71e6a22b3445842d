"""The compiled search: plans are served uncompiled at once, and faster as soon as the compiler is done.

Two small graphs are compiled, not the whole search: a rollout with its terminal value, and one denoising step. Both see rows only, so each is
one graph for any number of environments and candidates, and each of its loops is compiled once. What is around them (elites, means) is small.
"""

from __future__ import annotations

import threading

import torch

from modip_ray.model.diffusion import DiffusionPolicy
from modip_ray.model.hardware import beside, compiled
from modip_ray.planning.search import Search

EXAMPLE_ROWS = 48                   # of the call that compiles; any number that is no other size of the networks


class CompileBeside:
    """Compiles a search's parts in a thread of its own, and puts them in the search when both have run. `ready` says when; close by letting it end."""

    def __init__(self, search: Search):
        self.search, self.ready = search, threading.Event()
        self.thread = beside(self.work, "the planner")

    def work(self) -> None:
        rollout, denoise = self.compile()
        if denoise is not None:
            self.search.agent.policy.denoise = denoise
        self.search.rollout = rollout                                               # last: planning/graphs.py sees by it that both are there
        self.ready.set()

    @torch.inference_mode()
    def compile(self) -> tuple:
        search, policy, model = self.search, self.search.agent.policy, self.search.agent.world_model
        rollout, device, rows = compiled(search.rollout, "the planner"), search.agent.normalizer.obs_mean.device, EXAMPLE_ROWS
        hidden = torch.zeros(rows, model.z_in.out_features, device=device)
        actions = torch.zeros(rows, search.cfg.planner.horizon, policy.action_dim, device=device)
        obs = torch.zeros(rows // 2, search.agent.obs_dim, device=device)
        noisy = torch.zeros(rows, policy.horizon * policy.action_dim, device=device)
        with search.precision():
            hidden = hidden.to(model.z_in(model.encode(obs)).dtype)
            for x in (hidden, actions):
                torch._dynamo.mark_dynamic(x, 0)
            rollout(hidden, actions)
            if not isinstance(policy, DiffusionPolicy):                             # one pass through a small network: nothing to gain
                return later(rollout), None
            denoise, features = compiled(policy.denoise, "the planner"), policy.embed(obs)
            for x in (features, noisy):
                torch._dynamo.mark_dynamic(x, 0)
            denoise(features, noisy, torch.zeros(1, dtype=torch.long, device=device))
        return later(rollout), later(denoise)


def later(function):
    """A compiled function that never compiles again: a call with other sizes than it was compiled for runs uncompiled."""
    def call(*args):
        with torch.compiler.set_stance("eager_on_recompile"):
            return function(*args)
    return call
