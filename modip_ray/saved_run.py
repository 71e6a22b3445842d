"""A finished (or stopped) run's agent put to use again: evaluate it, collect with it, show it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gymnasium as gym

from modip_ray.config import Config, ConfigError
from modip_ray.learning.env_source import env_factory
from modip_ray.learning.evaluation import EvalMode, jobs_for, joined, modes_of, run_job
from modip_ray.learning.offline_data import collect_to, policy_of
from modip_ray.policy import SavedAgent, agent_of_run, check_mode, load
from modip_ray.report.scores import ratio
from modip_ray.runfolder import Which, command_line, git_commit, machine, saved_config, versions
from modip_ray.session import score
from modip_ray.tasks.collect import collect
from modip_ray.tasks.d4rl_data import Dataset, read_d4rl, write_d4rl
from modip_ray.tasks.envs import EnvFactory
from modip_ray.tasks.scores import paired_difference


def evaluate_run(run: Path, mode: EvalMode, episodes: int | None = None, seed: int | None = None, overrides: Mapping[str, Any] = MappingProxyType({}),
                 checkpoint: Which = "newest") -> dict:
    """S of a mode, measured again: the same seeds in the same groups give the returns of the run's own summary. seed: the first; by default the run's, but
    for the best checkpoint those behind the episodes that it was chosen by, on which it is better than it is."""
    saved = agent_of_run(run, overrides, checkpoint)
    return measured(saved, mode, episodes, first_seed(saved.cfg, seed, checkpoint), overrides)


def first_seed(cfg: Config, seed: int | None, checkpoint: Which) -> int:
    return seed if seed is not None else cfg.eval.seed + (cfg.eval.every_episodes if checkpoint == "best" else 0)


def measured(saved: SavedAgent, mode: EvalMode, episodes: int | None, seed: int, overrides: Mapping[str, Any]) -> dict:
    """As `evaluate_run`, of an opened checkpoint."""
    cfg = saved.cfg
    check_mode(cfg, mode)
    if mode == "bc":
        saved.need_bc()
    jobs = jobs_for(mode, episodes or cfg.eval.episodes, seed)
    measures, seeds = joined([run_job(cfg, saved.agent, env_factory(cfg.task), job, saved.env_steps, saved.bc) for job in jobs], mode)
    return {"mode": mode, "run": str(saved.run), "checkpoint": saved.version, "env_steps": saved.env_steps, "settings": dict(overrides),
            "command": command_line(), **score(cfg, measures, seeds)}


def compare_run(run: Path, episodes: int | None = None, seed: int | None = None, overrides: Mapping[str, Any] = MappingProxyType({}),
                checkpoint: Which = "newest") -> dict:
    """BC, the policy alone and the planner, where there is one, on the same seeds; against_bc holds the paired differences and the ratio of means."""
    saved = agent_of_run(run, overrides, checkpoint)                                # one for all of them: a run that is at work writes others
    seed = first_seed(saved.cfg, seed, checkpoint)
    scores = {mode: measured(saved, mode, episodes, seed, overrides) for mode in modes_of(saved.cfg)}
    bc = scores["bc"]
    against = {mode: paired_difference(s["values"], bc["values"]) | {"ratio": ratio(scores, mode)}
               for mode, s in scores.items() if mode != "bc"}
    return {"run": str(run), "env_steps": bc["env_steps"], "command": command_line(), "git": git_commit(), "machine": machine(), "versions": versions(),
            "scores": scores, "against_bc": against}


def collect_run(cfg: Config | None, policy: str, mode: EvalMode, transitions: int, seed: int, out: Path) -> Dataset:
    """Write `out` from the demonstrator, a D4RL file's policy, or (cfg None) a run folder; returns what was written, read back."""
    if cfg is not None:
        source = policy if policy == "demonstrator" else f"policy:{policy}"
        collect_to(cfg.replace({"data.source": source}), policy_of(source, cfg.task.family), env_factory(cfg.task), out)
    else:
        cfg = saved_config(Path(policy))
        episodes = collect(load(policy, mode, seed).chunks, env_factory(cfg.task), transitions, cfg.task.max_episode_steps, seed)
        write_d4rl(out, episodes, {"env": cfg.task.env, "source": f"{policy} ({mode})", "seed": seed})
    return read_d4rl(out, max_episode_steps=cfg.task.max_episode_steps, action_range=None)


def rendering_env(cfg: Config) -> Callable[[], gym.Env]:
    """Makes the task's environment with pictures: small ones where the environment takes a size."""
    factory: EnvFactory = env_factory(cfg.task)

    def make() -> gym.Env:
        with suppress(TypeError):
            return factory(render_mode="rgb_array", width=320, height=240)
        try:
            return factory(render_mode="rgb_array")
        except TypeError as error:
            raise ConfigError(f"task.env: {cfg.task.env} cannot be rendered ({error}); have it take render_mode=\"rgb_array\"") from error
    return make
