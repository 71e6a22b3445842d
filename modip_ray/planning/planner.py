"""The planner: observations in, action chunks out. Policy proposals -> MPPI in latent space -> terminal V -> guard. Batched rows, no Ray.

Symbols: B rows, P proposals, N candidates, E critic members, H horizon, Do / Da / Dz sizes.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from modip_ray.baselines.parl import ActionSearch
from modip_ray.config import Config
from modip_ray.model.agent import Agent
from modip_ray.model.hardware import uses_bf16
from modip_ray.planning.graphs import Buckets
from modip_ray.planning.search import Noise, Search
from modip_ray.schedule import widened
from modip_ray.timing import Timer

Mode = Literal["mpc", "policy"]
MODES = get_args(Mode)


@dataclass
class Plan:
    """What a rollout gets back. Actions in environment units."""

    actions: np.ndarray    # (B, c, Da) to be executed now
    plans: np.ndarray      # (B, H, Da) the whole planned sequence
    gains: np.ndarray      # (B,) predicted return of the plan minus that of the policy's own proposals, less the guard's penalty; NaN in policy
                           # mode, and where the plan is not finite
    version: int           # of the weights that planned


class WarmStarts:
    """Previous plans by slot: a table on the planner's device that grows by doubling. Slots are any hashable ids (worker, incarnation, env)."""

    def __init__(self, horizon: int, action_dim: int, device: torch.device):
        self.rows: dict[Hashable, int] = {}
        self.table = torch.zeros(64, horizon, action_dim, device=device)

    def index(self, slots: Sequence[Hashable], reset: np.ndarray) -> tuple[Tensor, Tensor]:
        """Table rows (B,) of the slots and whether each holds a usable plan (B,)."""
        known = [s in self.rows and not r for s, r in zip(slots, reset, strict=True)]
        for s in slots:
            self.rows.setdefault(s, len(self.rows))
        while len(self.rows) > len(self.table):
            self.table = torch.cat([self.table, torch.zeros_like(self.table)])
        device = self.table.device
        return torch.tensor([self.rows[s] for s in slots], device=device), torch.tensor(known, device=device)

    @torch.inference_mode()                                                         # a table that grew inside plan() is an inference tensor
    def forget(self, slots: Sequence[Hashable]) -> None:
        """Drop slots of a dead worker; their table rows are given to the last ones."""
        gone = set(slots)
        keep = [s for s in self.rows if s not in gone]
        if keep:
            self.table[: len(keep)] = self.table[torch.tensor([self.rows[s] for s in keep], device=self.table.device)].clone()
        self.rows = {s: i for i, s in enumerate(keep)}


class Planner:
    """Owns a frozen copy of the agent. `progress` (0..1 of the online steps) widens the trust region."""

    def __init__(self, cfg: Config, agent: Agent, seed: int = 0, timer: Timer | None = None):
        self.device = agent.normalizer.obs_mean.device
        self.cfg, self.search = cfg, make_search(cfg, agent.frozen_copy(), uses_bf16(cfg.resources.precision, self.device))
        self.find = Buckets(self.search) if self.device.type == "cuda" and cfg.planner.kind == "mppi" else self.search
        self.rng = torch.Generator(self.device).manual_seed(seed)
        self.warm = WarmStarts(cfg.planner.horizon, agent.action_dim, self.device)
        self.version, self.env_steps = 0, 0
        self.not_finite = 0                                                         # plans in whose place the policy's own action was taken
        self.timer = timer or Timer()

    @property
    def agent(self) -> Agent:
        """The weights that act; load them in place."""
        return self.search.agent

    @agent.setter
    def agent(self, agent: Agent) -> None:
        self.search.agent = agent

    def load(self, version: int, vector: np.ndarray, env_steps: int) -> None:
        """Swap in newer weights between two plans."""
        self.agent.load_flat(vector)
        self.version, self.env_steps = version, env_steps

    def noise(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self.rng, device=self.device)

    @torch.inference_mode()
    def plan(self, obs: np.ndarray, slots: Sequence[Hashable], reset: np.ndarray, mode: Mode = "mpc", explore: bool = False) -> Plan:
        """obs (B, Do) raw, slots B ids, reset (B,) bool: True where an episode has just begun.

        ValueError on a wrong or non-finite observation or an unknown mode; FloatingPointError when the weights yield actions that are not finite.
        """
        if mode not in MODES:
            raise ValueError(f"planner: mode must be one of {', '.join(MODES)}, got {mode!r}")
        if obs.ndim != 2 or obs.shape[1] != self.agent.obs_dim or not len(obs):
            raise ValueError(f"planner: observations of shape {obs.shape}, expected (rows, {self.agent.obs_dim}) with at least one row")
        if not np.isfinite(obs).all():
            row, col = np.argwhere(~np.isfinite(obs))[0]
            raise ValueError(f"planner: observation of slot {slots[row]} is {obs[row, col]} in column {col}; the environment must return finite numbers")
        s = self.agent.normalizer.obs(torch.as_tensor(obs, dtype=torch.float32, device=self.device))   # (B, Do)
        plan = self.policy_plan(s) if mode == "policy" else self.mpc_plan(s, slots, reset, explore)
        if not np.isfinite(plan.actions).all():
            raise FloatingPointError(f"planner: the policy of weight version {self.version} proposes actions that are not finite; "
                               "training has diverged, lower policy.lr and resume from an earlier checkpoint")
        return plan

    def policy_plan(self, s: Tensor) -> Plan:
        cfg, policy = self.cfg.policy, self.agent.policy
        with self.timer("policy/ddim"), self.search.precision():
            chunk = self.agent.act(s, self.noise((len(s), cfg.samples, policy.horizon, policy.action_dim)), cfg.sampling_steps)     # (B, H, Da)
        plans = self.agent.normalizer.raw_action(chunk).cpu().numpy()
        return Plan(plans[:, : cfg.n_action_steps], plans, np.full(len(s), np.nan, np.float32), self.version)

    def mpc_plan(self, s: Tensor, slots: Sequence[Hashable], reset: np.ndarray, explore: bool) -> Plan:
        p, policy = self.cfg.planner, self.agent.policy
        rows, has_warm = self.warm.index(slots, reset)
        noise = Noise(self.noise((len(s), p.proposals, policy.horizon, policy.action_dim)),
                      self.noise((len(s), p.iterations, p.gaussian, p.horizon, policy.action_dim)))
        with self.timer("plan/search"):
            plan, std, gain, accepted = self.find(s, noise, self.warm.table[rows], has_warm, torch.tensor(self.trust_region(), device=self.device))
        c = p.n_action_steps
        self.warm.table[rows] = torch.cat([plan[:, c:], plan[:, -1:].expand(-1, c, -1)], 1)[:, : p.horizon]
        act = plan[:, :c]
        if explore:
            act = torch.where(accepted[:, None, None], (act + std[:, :c] * self.noise(tuple(act.shape))).clamp(-1, 1), act)
        raw = self.agent.normalizer.raw_action
        actions = raw(torch.cat([act, plan], 1))                                    # (B, c + H, Da)
        answer = torch.cat([gain[:, None], actions.flatten(1)], 1).cpu().numpy()    # the one place that waits for the device
        gains, actions = answer[:, 0], answer[:, 1:].reshape(actions.shape)
        self.not_finite += int(np.isnan(gains).sum())
        return Plan(actions[:, :c], actions[:, c:], gains, self.version)

    def trust_region(self) -> tuple[float, float]:
        return trust_region(self.cfg, self.env_steps)


def make_search(cfg: Config, agent: Agent, bf16: bool) -> Search:
    """The search that planner.kind names."""
    return (Search if cfg.planner.kind == "mppi" else ActionSearch)(cfg, agent, bf16)


def trust_region(cfg: Config, env_steps: float) -> tuple[float, float]:
    """(largest std of Gaussian candidates, how far they may leave the range of the policy's proposals), widening with online data."""
    g = cfg.guard
    progress = env_steps / g.widen_steps if g.widen_steps else 1.0
    return widened(g.std_max, g.std_max_final, progress), widened(g.trust, g.trust_final, progress)
