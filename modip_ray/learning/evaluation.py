"""Evaluation on fixed seeds, and how good world model and value are. Plain functions, no Ray."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from modip_ray.config import Config
from modip_ray.learning.plan_probe import PlanProbe, Probed
from modip_ray.learning.replay import Batch
from modip_ray.model.agent import Agent
from modip_ray.planning.planner import Planner
from modip_ray.tasks.envs import EnvError, EnvFactory, env_seed
from modip_ray.tasks.rollout import rollout_episodes
from modip_ray.tasks.scores import measure
from modip_ray.timing import Timer

EvalMode = Literal["bc", "policy", "mpc"]
MODES: tuple[EvalMode, ...] = ("bc", "policy", "mpc")
GROUP = 10                          # episodes run side by side; part of the result, as they share one planner's noise
ATTEMPTS = 3                        # at an episode whose environment fails
DIAGNOSTIC_ROWS = 512


def modes_of(cfg: Config) -> tuple[EvalMode, ...]:
    """The ways of acting that a run is measured in, its method's own last: only MODIP has a planner."""
    return MODES if cfg.method == "modip" else ("bc", "policy")


@dataclass(frozen=True)
class Job:
    """Episodes to run side by side with one fresh planner: the unit that may go to any evaluator, with the same result everywhere."""

    mode: EvalMode
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Outcome:
    """What came of a job: measures by name (tasks/scores.py) and lengths, one value an episode; of plans what `PlanProbe.measure` says."""

    job: Job
    measures: dict[str, list[float]]
    lengths: list[int]
    plans: Probed = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)                                 # of environments, whose episodes were begun anew

    @property
    def returns(self) -> list[float]:
        return self.measures["return"]


def jobs_for(mode: EvalMode, episodes: int, seed: int) -> list[Job]:
    """Seeds seed .. seed+episodes-1 in groups of GROUP."""
    seeds = range(seed, seed + episodes)
    return [Job(mode, tuple(seeds[i:i + GROUP])) for i in range(0, episodes, GROUP)]


def run_job(cfg: Config, agent: Agent, env_factory: EnvFactory, job: Job, env_steps: int, bc: np.ndarray | None, timer: Timer | None = None) -> Outcome:
    """Episodes of a job. `agent` holds the current weights, `bc` its frozen `acting_part` (for mode bc); env_steps sets the trust region's width.

    The planner's noise depends on the job's seeds alone: the same weights and the same job give the same returns, wherever it runs.
    """
    seed = env_seed(len(job.seeds), *job.seeds)
    planner = Planner(cfg, agent, seed=seed, timer=timer)
    planner.env_steps = env_steps
    if job.mode == "bc":
        if bc is None:
            raise ValueError("mode 'bc' needs the frozen policy, which exists once the offline phase is over")
        planner.agent.load_flat(bc, planner.agent.acting_part)
    mode = "mpc" if job.mode == "mpc" else "policy"
    probe = PlanProbe(planner, seed) if mode == "mpc" else None

    def act(obs: np.ndarray, slots: np.ndarray, reset: np.ndarray) -> np.ndarray:
        plan = planner.plan(obs, slots.tolist(), reset, mode)
        if probe is not None:
            probe.add(slots, plan, reset)
        return plan.actions
    faults: list[EnvError] = []
    episodes = rollout_episodes(act, env_factory, job.seeds, cfg.task.max_episode_steps, attempts=ATTEMPTS, faults=faults)
    return Outcome(job, measure(cfg.task.metric, episodes), [e.length for e in episodes], probe.measure(episodes) if probe is not None else {},
                   [str(fault) for fault in faults])


def run_jobs(cfg: Config, agent: Agent, env_factory: EnvFactory, jobs: Sequence[Job], env_steps: int, bc: np.ndarray | None, timers: Mapping[str, Timer],
             progress: Callable[[Outcome], None] | None = None) -> list[Outcome]:
    """Jobs one after another in this process; timers: of driver and evaluator, progress: called with each outcome. The rest as of `run_job`."""
    outcomes = []
    for job in jobs:
        with timers["driver"]("evaluate"), timers["evaluator"](f"episodes/{job.mode}"):
            outcomes.append(run_job(cfg, agent, env_factory, job, env_steps, bc))
        if progress is not None:
            progress(outcomes[-1])
    return outcomes


def joined(outcomes: Sequence[Outcome], mode: EvalMode) -> tuple[dict[str, list[float]], list[int]]:
    """Measures and seeds of a mode's outcomes, by ascending seed; both empty where the mode was not evaluated."""
    mine = sorted((o for o in outcomes if o.job.mode == mode), key=lambda o: o.job.seeds)
    names = mine[0].measures if mine else {}
    return {name: [v for o in mine for v in o.measures[name]] for name in names}, [seed for o in mine for seed in o.job.seeds]


@torch.inference_mode()
def diagnose(cfg: Config, agent: Agent, batch: Batch) -> dict[str, object]:
    """Open-loop error of the world model by horizon, and V against realised discounted returns, on a `ReplayBuffer.sequences` batch.

    latent_r2[h], reward_r2[h] : share of the variance explained h+1 steps ahead of the encoder's own latents / the rewards (1: perfect)
    value_pred, value_return   : V(s_0), mean of the ensemble, and the return to the segment's end, bootstrapped by V where it did not terminate
    """
    device = agent.normalizer.obs_mean.device
    b = {k: torch.from_numpy(v).to(device) for k, v in batch.items()}
    norm, model = agent.normalizer, agent.world_model
    z = model.encode(norm.obs(b["obs"]))                                            # (B, H+1, Dz)
    latents, rewards, _ = model.rollout(z[:, 0], norm.action(b["action"]))          # (B, H+1, Dz), (B, H)
    mask = b["mask"].bool()
    horizon = mask.shape[1]
    latent = [r_squared(latents[mask[:, h], h + 1], z[mask[:, h], h + 1]) for h in range(horizon)]
    reward = [r_squared(rewards[mask[:, h], h] * model.reward_scale, b["reward"][mask[:, h], h]) for h in range(horizon)]
    bootstrap = agent.critic(model.encode(norm.obs(b["bootstrap_obs"][:, 0]))).mean(0)
    value, realised = agent.critic(z[:, 0]).mean(0), b["n_step_return"][:, 0] + b["discount"][:, 0] * bootstrap
    return {"horizon": list(range(1, horizon + 1)), "latent_r2": latent, "reward_r2": reward, "value_pred": value.tolist(), "value_return": realised.tolist(),
            "value_corr": correlation(value, realised)}


def r_squared(predicted: torch.Tensor, true: torch.Tensor) -> float:
    """1 - squared error / variance, all columns together; nan where there is no variance."""
    total = (true - true.mean(0)).square().sum()
    return float(1 - (predicted - true).square().sum() / total) if len(true) > 1 and total > 0 else float("nan")


def correlation(x: torch.Tensor, y: torch.Tensor) -> float:
    if len(x) < 2 or x.std() == 0 or y.std() == 0:
        return float("nan")
    return float(torch.corrcoef(torch.stack([x, y]))[0, 1])
