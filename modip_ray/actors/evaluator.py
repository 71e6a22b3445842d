"""The evaluator role: own environments, own planner, fixed seeds; beside the training or after it."""

from __future__ import annotations

from typing import Any

import ray
import torch

from modip_ray.actors.pulse import GROUP, PULSE, Life, Pulse
from modip_ray.config import Config
from modip_ray.learning.build import blank_agent, device_of
from modip_ray.learning.evaluation import DIAGNOSTIC_ROWS, Job, Outcome, diagnose, run_job
from modip_ray.learning.system import Report
from modip_ray.learning.weights import load_parts
from modip_ray.model.hardware import prepare_process
from modip_ray.tasks.envs import EnvFactory
from modip_ray.timing import Timer


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, concurrency_groups=GROUP)
class EvaluatorActor:
    """Its answers depend on the store's weights only, so Ray may restart it and repeat a call."""

    def __init__(self, cfg: Config, obs_dim: int, action_dim: int, env_factory: EnvFactory, store: str, replay: str):
        prepare_process(cfg.resources.torch_threads)
        self.cfg, self.env_factory, self.timer = cfg, env_factory, Timer()
        self.store, self.replay = ray.get_actor(store), ray.get_actor(replay)
        self.agent = blank_agent(cfg, obs_dim, action_dim, device_of(cfg, 0))
        self.versions: dict[str, int] = {}
        self.env_steps, self.bc = 0, None
        self.life = Life(self.timer)

    @ray.method(**PULSE)
    def pulse(self) -> Pulse:
        return self.life.pulse()

    def ready(self) -> None:
        """Answered once the actor is there."""

    def pull(self) -> None:
        torch.set_num_threads(self.cfg.resources.torch_threads)                     # counts for the thread that calls it
        newer, self.env_steps = self.get(self.store.newer.remote(self.versions))
        self.versions |= {part: version for part, (version, _) in newer.items()}
        load_parts(self.agent, newer)
        if "bc" in newer:
            self.bc = newer["bc"][1].copy()

    def run(self, job: Job) -> Outcome:
        """One group of episodes with the newest weights."""
        self.pull()
        return self.outcome(job)

    def outcome(self, job: Job) -> Outcome:
        with self.timer(f"episodes/{job.mode}"):
            return run_job(self.cfg, self.agent, self.env_factory, job, self.env_steps, self.bc)

    def measure(self, jobs: list[Job]) -> Report:
        """All jobs and the diagnostics with the weights of now."""
        self.pull()
        outcomes = [self.outcome(job) for job in jobs]
        with self.timer("diagnose"):
            batch, plans = self.get(self.replay.diagnostic_batch.remote(DIAGNOSTIC_ROWS, 2 * self.cfg.planner.horizon, self.cfg.eval.seed))
            diagnostics = diagnose(self.cfg, self.agent, {k: v.copy() for k, v in batch.items()}) | plans
        return Report(self.env_steps, self.versions.get("model", 0), outcomes, diagnostics)

    def timing(self) -> dict[str, Any]:
        return self.timer.snapshot()

    def get(self, ref: ray.ObjectRef) -> Any:
        return ray.get(ref, timeout=self.cfg.resources.patience_s)
