"""A run's checkpoint as something that acts: `modip_ray.load(run).act(observation)`. No Ray.

Symbols: B rows, Do / Da sizes of observation and action, c actions executed before the next look (n_action_steps).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gymnasium as gym
import numpy as np

from modip_ray.config import Config, ConfigError
from modip_ray.learning.build import device_of, saved_agent
from modip_ray.learning.checkpoint import CheckpointError
from modip_ray.learning.env_source import env_factory
from modip_ray.learning.evaluation import EvalMode, modes_of
from modip_ray.learning.system import saved_bc
from modip_ray.model.agent import Agent
from modip_ray.model.hardware import prepare_process
from modip_ray.planning.planner import Mode, Plan, Planner
from modip_ray.runfolder import Which, open_checkpoint, saved_config
from modip_ray.start import BY_ITSELF

ACTING = ("planner.", "guard.", "resources.", "eval.", *BY_ITSELF)              # may be other than in training


@dataclass(frozen=True)
class SavedAgent:
    """What a run's checkpoint acts with. bc: frozen weights of the policy before fine-tuning, None before the offline phase's end."""

    run: Path
    cfg: Config
    agent: Agent
    bc: np.ndarray | None
    env_steps: int
    version: str                    # name of the checkpoint

    def act_as(self, mode: EvalMode) -> None:
        """Load the weights that a mode acts with. CheckpointError where there is no BC policy yet."""
        if mode == "bc":
            self.agent.load_flat(self.need_bc(), self.agent.acting_part)

    def need_bc(self) -> np.ndarray:
        if self.bc is None:
            raise CheckpointError(f"{self.run}: has no frozen BC policy yet: the offline phase is not over; use --mode policy, or train on")
        return self.bc


def agent_of_run(run: Path, overrides: Mapping[str, Any] = MappingProxyType({}), checkpoint: Which = "newest") -> SavedAgent:
    """The agent of a run's newest or best checkpoint.

    overrides: settings of acting by dotted name, in place of the run's.
    """
    for key in overrides:
        if not key.startswith(ACTING):
            raise ConfigError(f"{key}: decides how the run was trained; only settings of acting can be changed afterwards ({', '.join(ACTING)})")
    cfg, saved = saved_config(run).replace(dict(overrides)), open_checkpoint(run, checkpoint)
    prepare_process(cfg.resources.torch_threads)
    if cfg.method == "dppo":
        from modip_ray.baselines import dppo
        agent = dppo.saved_agent(cfg, saved, device_of(cfg))
        bc: np.ndarray | None = dppo.bc_policy(agent)
    else:
        agent, bc = saved_agent(cfg, saved, device_of(cfg)), saved_bc(saved)
    return SavedAgent(run, cfg, agent, bc, int(saved.counters["env_steps"]), saved.path.name)


def check_mode(cfg: Config, mode: str) -> None:
    """ConfigError for a mode that a run does not have."""
    modes = modes_of(cfg)
    if mode not in modes:
        planner = "" if "mpc" in modes else f" (method {cfg.method} has no planner)"
        raise ConfigError(f"mode: got {mode!r}, expected one of {', '.join(modes)}{planner}")


class RunPolicy:
    """A run's way of acting: BC or the fine-tuned diffusion policy by itself, or the planner (mpc). `version`: name of the checkpoint.

    `act` serves one environment and keeps the rest of a chunk for the next calls; `chunks` any number of them, and keeps but the planner's warm starts.
    """

    def __init__(self, saved: SavedAgent, mode: EvalMode, seed: int = 0):
        check_mode(saved.cfg, mode)
        saved.act_as(mode)
        self.cfg, self.mode, self.version = saved.cfg, mode, saved.version
        self.planner = Planner(saved.cfg, saved.agent, seed)
        self.planner.env_steps = saved.env_steps
        self.plan_mode: Mode = "mpc" if mode == "mpc" else "policy"
        self.obs_dim, self.action_dim = saved.agent.obs_dim, saved.agent.action_dim
        self.reset()

    def __repr__(self) -> str:
        return (f"<RunPolicy {self.cfg.task.name}, mode {self.mode}, {self.version}: observation ({self.obs_dim},) -> action ({self.action_dim},) of "
                f"{self.cfg.task.env}>")

    def reset(self) -> None:
        """A new episode begins in the environment of `act`."""
        self.chunk, self.new = np.empty((0, self.action_dim), np.float32), True

    def act(self, obs: np.ndarray) -> np.ndarray:
        """obs (Do,) raw -> action (Da,) in the environment's units. ValueError on a wrong or non-finite observation."""
        try:
            row = np.asarray(obs, np.float32)
        except (TypeError, ValueError) as error:
            raise ValueError(f"obs: got {type(obs).__name__}, expected {self.obs_dim} numbers") from error
        if row.shape != (self.obs_dim,) or not np.isfinite(row).all():
            raise ValueError(f"obs: got {row}, of shape {row.shape}; expected {self.obs_dim} finite numbers")
        if not len(self.chunk):
            self.chunk, self.new = self.chunks(row[None], ["act"], np.array([self.new]))[0], False
        action, self.chunk = self.chunk[0], self.chunk[1:]
        return action

    def chunks(self, obs: np.ndarray, slots: Any, reset: np.ndarray) -> np.ndarray:
        """obs (B, Do) raw, slots B ids of environments, reset (B,) bool: True where an episode has just begun -> actions (B, c, Da) to execute now."""
        return self.plan(obs, slots, reset).actions

    def plan(self, obs: np.ndarray, slots: Any, reset: np.ndarray) -> Plan:
        """As `chunks`, with the whole plans (B, H, Da)."""
        return self.planner.plan(obs, [*slots], reset, self.plan_mode)

    def make_env(self) -> gym.Env:
        """The run's environment, cut at its time limit. ConfigError where it cannot be made here, as one whose class lives in the script that trained."""
        return gym.wrappers.TimeLimit(env_factory(self.cfg.task)(), self.cfg.task.max_episode_steps)


def load(run: str | Path, mode: EvalMode = "policy", seed: int = 0, overrides: Mapping[str, Any] = MappingProxyType({}),
         checkpoint: Which = "newest") -> RunPolicy:
    """The policy of a run folder.

    mode       : "policy" (fine-tuned, by itself), "bc" (before fine-tuning) or "mpc" (the planner)
    seed       : of the noise that chunks are denoised from
    overrides  : settings of acting in place of the run's, e.g. {"policy.sampling_steps": 3, "resources.device": "cpu"}
    checkpoint : the newest, or the best by its periodic evaluations (log.keep_best)
    Raises RunError, CheckpointError or ConfigError with what to do.
    """
    return RunPolicy(agent_of_run(Path(run), overrides, checkpoint), mode, seed)
