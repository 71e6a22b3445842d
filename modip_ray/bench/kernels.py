"""Kernels of planner, learner and replay against what they replace: precision, compilation, V's tail, the policy-independent target."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from modip_ray.bench.rows import ACTION_DIM, OBS_DIM, Row, Setting, compared
from modip_ray.config import Config
from modip_ray.learning.learner import Learner
from modip_ray.model.diffusion import DiffusionPolicy
from modip_ray.model.networks import EnsembleMLP
from modip_ray.planning.compiled import CompileBeside
from modip_ray.planning.planner import Planner

TAIL_STEPS = (1, 2, 5, 10)          # DDIM steps that the tail's table has
COMPILE_S = 300.0                   # patience with the compiler


def with_settings(cfg: Config, **dotted: object) -> Config:
    return cfg.replace({k.replace("__", "."): v for k, v in dotted.items()})


def precision_and_compilation(s: Setting) -> list[Row]:
    """Plans a second as the settings serve them (bf16, compiled) and each of both alone, against float32 uncompiled."""
    rows, rng = s.cfg.rollout.least * s.cfg.rollout.envs_per_worker, np.random.default_rng(0)
    obs, reset = rng.standard_normal((rows, OBS_DIM), dtype=np.float32), np.zeros(rows, bool)
    planners = {p: Planner(with_settings(s.cfg, resources__precision=p), s.agent) for p in ("fp32", "bf16")}
    fast, note = Planner(with_settings(s.cfg, resources__precision="bf16"), s.agent), "not compiled: resources.compile is false"
    if s.cfg.resources.compile is not False:
        beside = CompileBeside(fast.search)
        beside.thread.join(COMPILE_S)
        note = "compiled" if beside.ready.is_set() else "not compiled, see above"
    calls = [lambda p=p: p.plan(obs, range(rows), reset) for p in (fast, planners["bf16"], planners["fp32"])]
    both, bf16, eager = (rows / t for t in s.medians(*calls))
    against = f"float32, not compiled; {rows} rows"
    return [compared("planner.bf16_compile_vs_eager_fp32", both, "plans/s", eager, f"{against} ({note})"),
            compared("planner.bf16_vs_eager_fp32", bf16, "plans/s", eager, against)]


def tails(s: Setting) -> list[Row]:
    """Candidates scored a second with V's tail, against Q(z, pi(z)) whose actions a diffusion policy of the demo's size draws from the latent."""
    p, c, rows = s.cfg.planner, s.cfg.critic, s.cfg.rollout.least * s.cfg.rollout.envs_per_worker
    search, policy = Planner(s.cfg, s.agent).search, latent_policy(s.cfg)
    q = EnsembleMLP(c.members, [s.cfg.world_model.latent + ACTION_DIM, c.width, c.width, 1])
    z = search.agent.world_model.encode(torch.randn(rows, OBS_DIM)).detach()
    actions = torch.rand(rows, p.gaussian or p.proposals, p.horizon, ACTION_DIM) * 2 - 1
    state_value = search.agent.critic

    def scored(tail: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        @torch.inference_mode()
        def call() -> None:
            search.agent.critic.forward = tail
            with search.precision():
                search.returns(z, actions)
        return call

    steps = sorted({*(n for n in TAIL_STEPS if n <= s.cfg.policy.denoising_steps), s.cfg.policy.sampling_steps})
    v_tail = type(state_value).forward.__get__(state_value)
    v, *qs = s.medians(scored(v_tail), *(scored(lambda z, n=n: q_value(policy, q, z, n)) for n in steps))
    rate, n = {k: actions.shape[0] * actions.shape[1] / t for k, t in zip(steps, qs, strict=True)}, actions.shape[0] * actions.shape[1]
    acting = s.cfg.policy.sampling_steps
    return [compared("planner.v_tail_vs_q_tail", n / v, "candidates/s", rate[acting], f"Q(z, pi(z)), {acting} DDIM steps, those used for acting"),
            *(compared(f"planner.v_tail_vs_q_tail.steps_{k}", n / v, "candidates/s", rate[k], f"Q(z, pi(z)), {k} DDIM steps") for k in steps)]


def latent_policy(cfg: Config) -> DiffusionPolicy:
    """The configured diffusion policy, conditioned on the latent: what a tail needs that starts where no observation is known."""
    p = cfg.policy
    return DiffusionPolicy(cfg.world_model.latent, ACTION_DIM, p.horizon, p.denoising_steps, p.width, p.blocks, p.parametrization, p.network)


def q_value(policy: DiffusionPolicy, q: EnsembleMLP, z: Tensor, steps: int) -> Tensor:
    """Q(z, a) (E, R) with a, the first action of a chunk drawn by DDIM from latents z (R, Dz)."""
    chunk = policy.sample(z, torch.randn(len(z), 1, policy.horizon, policy.action_dim), steps)
    return q(torch.cat([z, chunk[:, 0, 0]], -1)).squeeze(-1)


def targets(s: Setting) -> list[Row]:
    """World-model updates a second, against those whose targets ask the policy (critic.target: policy_q), each uncompiled."""
    cfgs = [with_settings(s.cfg, resources__compile=False, critic__target=target) for target in ("value", "policy_q")]
    learners, batch = [Learner(cfg, Setting(cfg, s.seconds).agent) for cfg in cfgs], s.model_batch()
    mine, theirs = s.medians(*(lambda learner=learner: learner.update_model(batch) for learner in learners))
    return [compared("learner.policy_independent_vs_coupled", 1 / mine, "updates/s", 1 / theirs,
                     f"Q and targets that sample the policy, {s.cfg.policy.sampling_steps} DDIM steps")]


def compilation(s: Setting) -> list[Row]:
    """One update of each stream, compiled, against the same not compiled."""
    wanted = s.cfg.resources.compile is not False
    fast, eager = (Learner(with_settings(s.cfg, resources__compile=c), copy.deepcopy(s.agent)) for c in (wanted, False))
    model, policy = s.model_batch(), s.policy_batch()

    def both(learner: Learner) -> Callable[[], object]:
        return lambda: (learner.update_model(model), learner.update_policy(policy, distil=True))
    a, b = s.medians(both(fast), both(eager))
    return [compared("learner.compiled_vs_eager", 1 / a, "updates/s", 1 / b, "not compiled" + ("" if wanted else " (nor is this: resources.compile is false)"))]
