"""The compiled search: plans are served uncompiled at once, and faster as soon as the compiler is done.

Two small graphs are compiled, not the whole search: a rollout with its terminal value, and one denoising step. Both see rows only, so each is
one graph for any number of environments and candidates, and each of its loops is compiled once. What is around them (elites, means) is small.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

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
        search, policy = self.search, self.search.agent.policy
        with torch.inference_mode(), search.precision():
            rollout = self.rollout() if search.cfg.planner.kind == "mppi" else search.rollout              # action_values rolls nothing out
            if isinstance(policy, DiffusionPolicy):                                 # others: one pass through a small network, nothing to gain
                policy.denoise = self.denoise(policy)
        search.rollout = rollout                                                    # last: planning/graphs.py sees by it that both are there
        self.ready.set()

    def rollout(self) -> Callable:
        search, model, rollout = self.search, self.search.agent.world_model, compiled(self.search.rollout, "the planner")
        obs = torch.zeros(EXAMPLE_ROWS // 2, search.agent.obs_dim, device=search.agent.normalizer.obs_mean.device)
        hidden = torch.zeros(EXAMPLE_ROWS, model.z_in.out_features, device=obs.device).to(model.z_in(model.encode(obs)).dtype)
        actions = torch.zeros(EXAMPLE_ROWS, search.cfg.planner.horizon, search.agent.action_dim, device=obs.device)
        return ran(rollout, (hidden, actions))

    def denoise(self, policy: DiffusionPolicy) -> Callable:
        device = self.search.agent.normalizer.obs_mean.device
        features = policy.embed(torch.zeros(EXAMPLE_ROWS // 2, self.search.agent.obs_dim, device=device))
        noisy = torch.zeros(EXAMPLE_ROWS, policy.horizon * policy.action_dim, device=device)
        return ran(compiled(policy.denoise, "the planner"), (features, noisy), torch.zeros(1, dtype=torch.long, device=device))


def ran(function: Callable, rows: tuple[torch.Tensor, ...], *rest: torch.Tensor) -> Callable:
    """A compiled function after its first call, for any number of these rows."""
    for x in rows:
        torch._dynamo.mark_dynamic(x, 0)
    function(*rows, *rest)
    return later(function)


def later(function: Callable) -> Callable:
    """A compiled function that never compiles again: a call with other sizes than it was compiled for runs uncompiled."""
    def call(*args):
        with torch.compiler.set_stance("eager_on_recompile"):
            return function(*args)
    return call
