"""A finished (or stopped) run's agent put to use again: evaluate it, collect with it, show it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gymnasium as gym
import numpy as np
import torch

from modip_ray.config import Config, ConfigError
from modip_ray.learning.build import device_of, saved_agent
from modip_ray.learning.checkpoint import CheckpointError
from modip_ray.learning.env_source import env_factory
from modip_ray.learning.evaluation import MODES, EvalMode, jobs_for, joined, run_job
from modip_ray.learning.offline_data import collect_to, policy_of
from modip_ray.learning.system import saved_bc
from modip_ray.model.agent import Agent
from modip_ray.planning.planner import Mode, Planner
from modip_ray.runfolder import command_line, git_commit, machine, open_checkpoint, saved_config, versions
from modip_ray.session import score
from modip_ray.tasks.collect import collect
from modip_ray.tasks.d4rl_data import Dataset, read_d4rl, write_d4rl
from modip_ray.tasks.envs import EnvFactory
from modip_ray.tasks.rollout import Act
from modip_ray.tasks.scores import paired_difference

ACTING = ("planner.", "guard.", "resources.", "eval.", "policy.sampling_steps", "policy.n_action_steps")      # may be other than in training


@dataclass(frozen=True)
class SavedAgent:
    """What a run's newest checkpoint acts with. bc: frozen weights of the policy before fine-tuning, None before the offline phase's end."""

    run: Path
    cfg: Config
    agent: Agent
    bc: np.ndarray | None
    env_steps: int
    version: str                    # name of the checkpoint

    def act_as(self, mode: EvalMode) -> None:
        """Load the weights that a mode acts with. CheckpointError where there is no BC policy yet."""
        if mode == "bc":
            need_bc(self.run, mode, self.bc)
            self.agent.load_flat(self.bc, "policy")

    def planner(self, mode: EvalMode, seed: int = 0) -> Planner:
        """A planner of its own that acts as `mode` says, with plan(..., mode=plan_mode(mode))."""
        self.act_as(mode)
        planner = Planner(self.cfg, self.agent, seed=seed)
        planner.env_steps = self.env_steps
        return planner


def plan_mode(mode: EvalMode) -> Mode:
    """What the planner does in a mode: BC is its policy mode with other weights."""
    return "mpc" if mode == "mpc" else "policy"


def agent_of_run(run: Path, overrides: Mapping[str, Any] = MappingProxyType({})) -> SavedAgent:
    """The agent of a run's newest checkpoint.

    overrides: settings of acting by dotted name, in place of the run's.
    """
    for key in overrides:
        if not key.startswith(ACTING):
            raise ConfigError(f"{key}: decides how the run was trained; only settings of acting can be changed for an evaluation ({', '.join(ACTING)})")
    cfg, checkpoint = saved_config(run).replace(dict(overrides)), open_checkpoint(run)
    torch.set_num_threads(cfg.resources.torch_threads)
    agent = saved_agent(cfg, checkpoint, device_of(cfg))
    return SavedAgent(run, cfg, agent, saved_bc(checkpoint), int(checkpoint.counters["env_steps"]), checkpoint.path.name)


def evaluate_run(run: Path, mode: EvalMode, episodes: int | None = None, seed: int | None = None, overrides: Mapping[str, Any] = MappingProxyType({})) -> dict:
    """S of a mode, measured again: the same seeds in the same groups give the returns of the run's own summary."""
    saved = agent_of_run(run, overrides)
    cfg = saved.cfg
    need_bc(run, mode, saved.bc)
    jobs = jobs_for(mode, episodes or cfg.eval.episodes, cfg.eval.seed if seed is None else seed)
    measures, seeds = joined([run_job(cfg, saved.agent, env_factory(cfg.task), job, saved.env_steps, saved.bc) for job in jobs], mode)
    return {"mode": mode, "run": str(run), "env_steps": saved.env_steps, "settings": dict(overrides), "command": command_line(), **score(cfg, measures, seeds)}


def compare_run(run: Path, episodes: int | None = None, seed: int | None = None, overrides: Mapping[str, Any] = MappingProxyType({})) -> dict:
    """BC, the policy alone and the planner on the same seeds; against_bc holds the paired differences and the ratio of means."""
    scores = {mode: evaluate_run(run, mode, episodes, seed, overrides) for mode in MODES}
    bc = scores["bc"]
    against = {mode: paired_difference(s["values"], bc["values"]) | {"ratio": s["mean"] / bc["mean"] if bc["mean"] else float("nan")}
               for mode, s in scores.items() if mode != "bc"}
    return {"run": str(run), "env_steps": bc["env_steps"], "command": command_line(), "git": git_commit(), "machine": machine(), "versions": versions(),
            "scores": scores, "against_bc": against}


def actors_of_run(run: Path, mode: EvalMode, seed: int = 0) -> Act:
    """A run's way of acting, as `rollout_episodes`, `collect` and the video take it."""
    planner = agent_of_run(run).planner(mode, seed)
    return lambda obs, slots, reset: planner.plan(obs, slots.tolist(), reset, plan_mode(mode)).actions


def need_bc(run: Path, mode: EvalMode, bc: np.ndarray | None) -> None:
    if mode == "bc" and bc is None:
        raise CheckpointError(f"{run}: has no frozen BC policy yet: the offline phase is not over; use --mode policy, or train on")


def collect_run(cfg: Config | None, policy: str, mode: EvalMode, transitions: int, seed: int, out: Path) -> Dataset:
    """Write `out` from the demonstrator, a D4RL file's policy, or (cfg None) a run folder; returns what was written, read back."""
    if cfg is not None:
        source = policy if policy == "demonstrator" else f"policy:{policy}"
        collect_to(cfg.replace({"data.source": source}), policy_of(source, cfg.task.family), env_factory(cfg.task), out)
    else:
        cfg = saved_config(Path(policy))
        episodes = collect(actors_of_run(Path(policy), mode, seed), env_factory(cfg.task), transitions, cfg.task.max_episode_steps, seed)
        write_d4rl(out, episodes, {"env": cfg.task.env, "source": f"{policy} ({mode})", "seed": seed})
    return read_d4rl(out, max_episode_steps=cfg.task.max_episode_steps, action_range=None)


def rendering_env(cfg: Config) -> Callable[[], gym.Env]:
    """Makes the task's environment with pictures: small ones where the environment takes a size."""
    factory: EnvFactory = env_factory(cfg.task)

    def make() -> gym.Env:
        try:
            return factory(render_mode="rgb_array", width=320, height=240)
        except TypeError:
            return factory(render_mode="rgb_array")
    return make
