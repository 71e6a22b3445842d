"""A trial: one configuration trained with several seeds in this process, reported together. Plain object, no Ray.

A checkpoint of the serial system is the whole state, so a trial that goes on from one computes what one that never stopped does, bit for bit.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modip_ray.config import Config
from modip_ray.learning.build import build_spec
from modip_ray.learning.checkpoint import Checkpoint, State, begin, commit, newest, write_synced
from modip_ray.learning.env_source import env_factory, spaces
from modip_ray.learning.evaluation import jobs_for
from modip_ray.learning.offline_data import load_data, rolls_out
from modip_ray.learning.serial import SerialSystem
from modip_ray.learning.system import Setup, Status
from modip_ray.runfolder import RunError, saved_config
from modip_ray.search.scores import REPORTED, aggregated
from modip_ray.search.settings import TrialSettings, check_goes_on
from modip_ray.start import start_checkpoint
from modip_ray.tasks.dataset import Dataset

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Refitted(Checkpoint):
    """A checkpoint read for another planning horizon: stored plans are cut or padded. Only for runs that do not imitate plans (check_goes_on)."""

    horizon: int

    def read(self, component: str) -> State:
        state = super().read(component)
        return {k: fit(v, self.horizon) if k == "plan" or k.endswith((".plan", ".plans")) else v for k, v in state.items()}


def fit(plans: np.ndarray, horizon: int) -> np.ndarray:
    """(n, H, Da) -> (n, horizon, Da)."""
    more = max(0, horizon - plans.shape[1])
    return np.pad(plans, ((0, 0), (0, more), (0, 0)))[:, :horizon]


class Trial:
    """Built when it first has something to do: from a checkpoint (`load`), from the shared pre-training, or from nothing."""

    def __init__(self, settings: TrialSettings, shared: Path, data: tuple[str, Dataset] | None = None):
        """`shared`: folder of what the trials of a search have in common; `data`: (source, offline data) of the trial that this process ran before."""
        self.settings, self.shared, self.data = settings, shared, data
        self.systems: list[SerialSystem] = []

    # ---- training ----------------------------------------------------------------------------------------------------------------------------

    def iterate(self) -> dict[str, Any]:
        """Pre-train if that is to be done, advance every seed by `steps` environment steps, evaluate; the trial's report."""
        begun = time.monotonic()
        if not self.systems:
            checkpoint = start_checkpoint(self.settings.start) if self.settings.start is not None else None
            self.systems = [self.build(seed, checkpoint) for seed in self.settings.seeds]
        statuses = [self.advance(system) for system in self.systems]
        trained = time.monotonic()
        cfg = self.settings.cfg
        jobs = [job for mode in REPORTED for job in jobs_for(mode, cfg.eval.every_episodes, cfg.eval.seed)]
        scores = aggregated(cfg, [system.evaluate(jobs) for system in self.systems])
        losses = {k: float(np.mean([s.metrics[k] for s in statuses])) for k in statuses[0].metrics}
        return {**scores, "env_steps": min(s.env_steps for s in statuses), "updates": min(s.updates for s in statuses),
                "policy_updates": min(s.policy_updates for s in statuses), "env_steps_by_seed": [s.env_steps for s in statuses],
                "train_s": trained - begun, "eval_s": time.monotonic() - trained, "train": losses,
                "done": all(s.env_steps >= cfg.online.env_steps for s in statuses)}

    def advance(self, system: SerialSystem) -> Status:
        steps, total = self.settings.steps, self.settings.cfg.online.env_steps
        if system.bc is None:
            while not system.advance("pretrain", math.inf, until=0).done:
                pass
            system.freeze_bc()
        return system.advance("online", math.inf, min(total, steps * (system.replay.env_steps // steps + 1)))

    def build(self, seed: int, checkpoint: Checkpoint | None) -> SerialSystem:
        cfg = self.settings.member(seed)
        factory = env_factory(cfg.task)
        data = self.offline_data()
        _, low, high = spaces(factory)
        return SerialSystem(Setup(cfg, build_spec(cfg, data.episodes, low, high), data.episodes, factory, checkpoint=checkpoint), exact=True)

    def offline_data(self) -> Dataset:
        """The data, read once in this process; collected ones once in the whole search, by the trial that comes first."""
        cfg, start = self.settings.cfg, self.settings.start
        source = f"{start} {digest(cfg)}"
        if self.data is None or self.data[0] != source:
            with locked(self.shared / ".lock"):
                self.data = (source, load_data(with_cache(cfg, self.shared, start), env_factory(cfg.task), self.shared))
        return self.data[1]

    # ---- checkpoints -------------------------------------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """A run folder for each seed under `folder`: `modip eval` takes it. RunError before the first iteration: there is nothing to save yet."""
        if not self.systems:
            raise RunError(f"{folder}: nothing to save before the first iteration of a trial")
        for seed, system in zip(self.settings.seeds, self.systems, strict=True):
            run = folder / f"seed_{seed}"
            partial = begin(run / CHECKPOINTS)
            commit(partial, {"phase": "online", **system.save(partial), "next_eval": 0, "phase_s": {}}, keep=1)
            write_synced(run / "config.yaml", system.cfg.dump())

    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote, maybe of another trial and with settings that were perturbed since. ConfigError for one that cannot be."""
        self.close()
        systems = []
        for seed in self.settings.seeds:
            run, cfg = folder / f"seed_{seed}", self.settings.member(seed)
            if not run.is_dir():
                raise RunError(f"{run}: is not there; the checkpoint has {', '.join(sorted(p.name for p in folder.glob('seed_*'))) or 'no seeds'}, "
                               f"the trial asks for seeds {', '.join(map(str, self.settings.seeds))}")
            saved, checkpoint = saved_config(run), newest(run / CHECKPOINTS)
            check_goes_on(saved, cfg, run)
            if checkpoint is None:
                raise RunError(f"{run}: has no checkpoint; delete this checkpoint folder, so that the trial goes on from an older one")
            if saved.planner.horizon != cfg.planner.horizon:
                checkpoint = Refitted(checkpoint.path, checkpoint.counters, cfg.planner.horizon)
            systems.append(self.build(seed, checkpoint))
        self.systems = systems

    def close(self) -> None:
        for system in self.systems:
            system.close()
        self.systems = []


def with_cache(cfg: Config, shared: Path, start: Path | None) -> Config:
    """Data that a policy collects are kept in the search's shared folder, or are those of the run `start`; data.cache wins."""
    if cfg.data.cache is not None or not rolls_out(cfg.data.source):
        return cfg
    return cfg.replace({"data.cache": str(start / "data.hdf5" if start is not None else shared / f"{cfg.task.name}-{digest(cfg)}.hdf5")})


def digest(cfg: Config) -> str:
    """Identity of offline data: everything that decides what `load_data` gives."""
    tree = cfg.to_dict()
    return hashlib.sha256(json.dumps([tree["task"], tree["data"]], sort_keys=True).encode()).hexdigest()[:8]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time; the lock goes with a process that dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
