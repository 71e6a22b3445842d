"""Starting or joining Ray, and refusing at once what the cluster cannot give."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray

from modip_ray.config import Config, ConfigError

PREFIX = "modip_ray_"
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
NICENESS = {"RAY_worker_niceness": "0"}      # Ray's default of 15 lets any other process of the machine take the actors' processor time


@contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    """Environment variables set for the block; those that the user has set stay."""
    added = {k: v for k, v in values.items() if k not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def cpus_asked(cfg: Config) -> float:
    """CPUs that the actors reserve: planner, two learners, rollout workers (the others reserve none)."""
    r = cfg.resources
    return r.planner_cpus + 2 * r.learner_cpus + cfg.rollout.least * r.rollout_cpus


def remove_stale() -> None:
    """Folders of private Rays whose driver was killed."""
    for folder in Path("/tmp").glob(f"{PREFIX}*_*"):
        pid = folder.name.removeprefix(PREFIX).partition("_")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(folder, ignore_errors=True)


class Cluster:
    """A private Ray of this process ("local"), a cluster by address, or the one that is initialised already, which is left running."""

    def __init__(self, cfg: Config):
        self.cfg, self.folder = cfg, None
        self.own = not ray.is_initialized()
        if self.own:
            self.start()
        try:
            self.check()
        except ConfigError:
            self.close()
            raise

    def start(self) -> None:
        cfg, threads = self.cfg, {name: str(self.cfg.resources.torch_threads) for name in THREADS}
        quiet = {"log_to_driver": False, "logging_level": "ERROR"}
        if cfg.resources.ray_address == "local":
            remove_stale()
            self.folder = tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}_", dir="/tmp")      # sockets need a short path
            cpus = max(os.cpu_count() or 1, math.ceil(cpus_asked(cfg)))
            with environment(threads | NICENESS):                                              # inherited; as a runtime_env it costs 0.5 to 1 s an actor
                ray.init(address="local", num_cpus=cpus, _temp_dir=self.folder, include_dashboard=False, **quiet)
            return
        try:
            ray.init(address=cfg.resources.ray_address, runtime_env={"env_vars": threads}, **quiet)
        except ConnectionError as error:
            raise ConfigError(f"resources.ray_address: no Ray cluster at {cfg.resources.ray_address!r} ({error}); start one, or use 'local'") from error

    def check(self) -> None:
        """ConfigError naming the settings that ask for more than there is."""
        have, r = ray.cluster_resources(), self.cfg.resources
        gpus = r.planner_gpus + r.learner_gpus
        if gpus > have.get("GPU", 0.0):
            raise ConfigError(f"resources.planner_gpus={r.planner_gpus:g} and resources.learner_gpus={r.learner_gpus:g} ask for {gpus:g} GPU(s), "
                              f"Ray has {have.get('GPU', 0.0):g}; lower them (fractions share a GPU, 0 computes on the CPU)")
        if cpus_asked(self.cfg) > have.get("CPU", 0.0):
            raise ConfigError(f"resources.planner_cpus, learner_cpus (twice) and rollout_cpus x rollout.num_workers ask for {cpus_asked(self.cfg):g} CPUs, "
                              f"Ray has {have.get('CPU', 0.0):g}; lower them or rollout.num_workers")

    def cpus(self) -> int:
        """Processors that can really compute: evaluators are spread over them."""
        return max(1, os.cpu_count() or 1) if self.cfg.resources.ray_address == "local" else max(1, int(ray.cluster_resources().get("CPU", 1)))

    def close(self) -> None:
        if self.own and ray.is_initialized():
            ray.shutdown()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder = None
