"""Starting or joining Ray, and refusing at once what the cluster cannot give (or waiting for its autoscaler)."""

from __future__ import annotations

import functools
import math
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants, services
from ray.autoscaler.sdk import request_resources

from modip_ray.actors.placement import Bundle, demands, missing, total
from modip_ray.config import Config, ConfigError
from modip_ray.runfolder import RunError

PREFIX = "modip_ray_"
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}     # Ray as on a laptop's system: every server of it on 127.0.0.1, where it would be on all interfaces
NICENESS = {"RAY_worker_niceness": "0"}      # Ray's default of 15 lets any other process of the machine take the actors' processor time
LOOK_AGAIN_S = 2.0
PROBE_S = 5.0
LATE = "timed out during startup"


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


@contextmanager
def on_loopback() -> Iterator[None]:
    """A Ray that starts in the block listens on this machine alone. Ray has read its variable when it was imported: here too it is told anew."""
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        with environment(LOOPBACK):
            yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def own_groups() -> Iterator[None]:
    """Ray's servers, started in the block, get process groups of their own. What is sent to ours, by a terminal, `timeout` or a batch system, is for the driver
    to act on: it needs Ray until its checkpoint is written. Ray ends with the driver all the same (its own PR_SET_PDEATHSIG).
    """
    before = services.ConsolePopen
    services.ConsolePopen = functools.partial(before, process_group=0)
    try:
        yield
    finally:
        services.ConsolePopen = before


@contextmanager
def kept_signals() -> Iterator[None]:
    """ray.init puts a SIGTERM handler of its own in place, which saves nothing: ours come back after it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def remove_stale() -> None:
    """Folders of private Rays whose driver was killed."""
    for folder in Path("/tmp").glob(f"{PREFIX}*_*"):
        pid = folder.name.removeprefix(PREFIX).partition("_")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(folder, ignore_errors=True)


def probe(address: str) -> None:
    """ConfigError where nobody listens at HOST:PORT, at once: ray.init would try for minutes. "auto" is Ray's to find."""
    host, _, port = address.rpartition(":")
    if address.startswith("ray://"):
        raise ConfigError(f"resources.ray_address: got {address!r}, an address of Ray Client, which is far too slow for training; submit the run as a job "
                          "instead: modip submit --address http://HEAD:8265 -- train ...")
    if not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), PROBE_S).close()
    except OSError as error:
        raise ConfigError(f"resources.ray_address: nothing answers at {address!r} ({error}); start a cluster there, or use 'local' or 'auto'") from error


def nodes() -> dict[str, Bundle]:
    """Resources of the nodes that are alive, by address and the beginning of the node's id."""
    return {f"{n['NodeManagerAddress']}/{n['NodeID'][:6]}": n["Resources"] for n in ray.nodes() if n["Alive"]}


@contextmanager
def private_ray(variables: Mapping[str, str], **settings: Any) -> Iterator[None]:
    """A Ray of this process alone for the block, in a folder of its own, less whatever it leaves. Our own signal handlers stay.

    variables: environment variables that its processes inherit (as a runtime_env they cost 0.5 to 1 s an actor), less those that the user has set.
    settings: of ray.init. RunError where the machine is too busy for it.
    """
    remove_stale()
    folder = None
    try:
        with kept_signals(), environment(NICENESS | variables):
            folder = start_private(settings)
        yield
    finally:
        ray.shutdown()                                                                         # also one that has only half started
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def start_private(settings: dict[str, Any], again: bool = True) -> str:
    """The folder of a Ray that was started. On a machine that is busy beyond measure that may take more than the half minute that Ray allows: tried twice."""
    folder = tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}_", dir="/tmp")                    # sockets need a short path
    try:
        with on_loopback(), own_groups():
            ray.init(address="local", _temp_dir=folder, include_dashboard=False, **settings)
        return folder
    except BaseException as error:                                                             # also Ctrl-C; for being late Ray raises a bare Exception
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
        if LATE not in str(error):
            raise
        if not again:
            raise RunError("Ray did not start within its own limit of 30 s, twice: the machine is too busy, or out of memory or disk space in /tmp; "
                           "make room and start again") from error
    print("Ray did not start within its own limit of 30 s (the machine is very busy); trying once more", file=sys.stderr, flush=True)
    return start_private(settings, again=False)


class Cluster:
    """A private Ray of this process ("local"), a cluster by address, or the one that is initialised already, which is left running."""

    def __init__(self, cfg: Config):
        self.cfg, self.started = cfg, ExitStack()
        self.own = not ray.is_initialized()
        self.private = self.own and cfg.resources.ray_address == "local"                       # one machine: nothing need listen beyond it
        try:
            if self.own:
                self.start()
            self.check()
        except BaseException:                                                                  # also Ctrl-C while it starts
            self.close()
            raise

    def start(self) -> None:
        cfg, threads = self.cfg, {name: str(self.cfg.resources.torch_threads) for name in THREADS}
        quiet = {"log_to_driver": False, "logging_level": "ERROR"}
        if cfg.resources.ray_address == "local":
            asked = total(demands(cfg))
            cpus = max(os.cpu_count() or 1, math.ceil(asked.get("CPU", 0.0)))
            most = cfg.rollout.most / cfg.rollout.least                                        # this machine is every kind of node at once
            custom = {k: math.ceil(v * most) for k, v in asked.items() if k not in ("CPU", "GPU", "memory")}
            self.started.enter_context(private_ray(threads, num_cpus=cpus, resources=custom, **quiet))
            return
        probe(cfg.resources.ray_address)
        try:
            with kept_signals():
                ray.init(address=cfg.resources.ray_address, runtime_env={"env_vars": threads}, **quiet)
        except ConnectionError as error:
            raise ConfigError(f"resources.ray_address: no Ray cluster at {cfg.resources.ray_address!r} ({error}); start one, or use 'local'") from error

    def check(self) -> None:
        """ConfigError naming what is missing and which settings ask for it; where resources.wait_for_nodes_s allows, the autoscaler is asked for it first."""
        asked, deadline = demands(self.cfg), time.monotonic() + self.cfg.resources.wait_for_nodes_s
        lacking = missing(asked, nodes())
        if not lacking:
            return
        if time.monotonic() < deadline:
            print(f"waiting for nodes (resources.wait_for_nodes_s={self.cfg.resources.wait_for_nodes_s:g}): {'; '.join(lacking)}", flush=True)
            request_resources(bundles=[d.bundle for d in asked for _ in range(d.count) if d.bundle])
            while lacking and time.monotonic() < deadline:
                time.sleep(LOOK_AGAIN_S)
                lacking = missing(asked, nodes())
            request_resources(bundles=[])                                                      # from here on the actors themselves are the demand
        if lacking:
            there = "; ".join(f"{name}: " + ", ".join(f"{k} {v:g}" for k, v in sorted(node.items()) if not k.startswith(("node:", "object_store")))
                              for name, node in nodes().items())
            raise ConfigError(f"Ray lacks resources: {'; '.join(lacking)} (nodes: {there}). Lower what asks for them (fractions share a GPU, 0 GPUs compute "
                              "on the CPU), or add nodes (resources.wait_for_nodes_s waits for an autoscaler)")

    def cpus(self) -> int:
        """Processors that can really compute: evaluators are spread over them."""
        return max(1, os.cpu_count() or 1) if self.cfg.resources.ray_address == "local" else max(1, int(ray.cluster_resources().get("CPU", 1)))

    def close(self) -> None:
        if self.own:
            ray.shutdown()                                                                     # also one that has only half started
        self.started.close()
