"""A server on this machine: a private Ray, Ray Serve, one replica that listens itself."""

from __future__ import annotations

import importlib.util
import logging
import os
import random
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from modip_ray.actors.cluster import THREADS, private_ray
from modip_ray.config import ConfigError
from modip_ray.learning.build import device_of
from modip_ray.learning.evaluation import EvalMode
from modip_ray.policy import load
from modip_ray.runfolder import RunError

LOOPBACK = "127.0.0.1"
FOLLOW_S = 10.0
LOOK_S = 5.0
VISIBLE = "CUDA_VISIBLE_DEVICES"
UNASSIGNED = range(20_000, 30_000)
NAME = "modip"
QUIET = {"log_level": "ERROR", "enable_access_log": False}                          # a line for each request costs a fourth of its processor time


@contextmanager
def served(run: Path, mode: EvalMode = "policy", host: str = LOOPBACK, port: int = 8000, overrides: Mapping[str, Any] = MappingProxyType({}),
           seed: int = 0, follow_s: float = FOLLOW_S) -> Iterator[str]:
    """Serve a run for the block; yields the address. port 0: any free one. RunError, CheckpointError or ConfigError with what to do."""
    if importlib.util.find_spec("starlette") is None:
        raise RunError("serving needs Ray Serve, not installed here: pip install 'modip_ray[serve]'")
    cfg = load(run, mode, seed, overrides).cfg                                      # its errors at once, and here
    device, port = device_of(cfg), free_port(host, port)
    gpus = float(device.type == "cuda")
    threads = {name: str(cfg.resources.torch_threads) for name in THREADS}
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    with alone(device), private_ray(threads | direct(port), num_cpus=max(2, os.cpu_count() or 1), num_gpus=gpus or None, **quiet):
        from ray import serve

        from modip_ray.serve.app import application
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        serve.start(http_options={"host": host, "port": free_port(host, 0)}, logging_config=QUIET)
        try:
            serve.run(application(run, mode, overrides, seed, follow_s, gpus), name=NAME, route_prefix="/", logging_config=QUIET)
        except RuntimeError as error:
            said = [line for d in serve.status().applications[NAME].deployments.values() for line in d.message.splitlines() if line.strip()]
            raise RunError(f"the server did not start: {said[-1].strip() if said else error}") from error
        yield f"http://{f'[{host}]' if ':' in host else host}:{port}"


@contextmanager
def alone(device: torch.device) -> Iterator[None]:
    """What starts in the block sees this GPU and no other, where its number was given: Ray deals out the first one that it sees."""
    before = os.environ.get(VISIBLE)
    if device.index is not None:
        os.environ[VISIBLE] = before.split(",")[device.index] if before else str(device.index)
    try:
        yield
    finally:
        os.environ.pop(VISIBLE, None)
        os.environ.update({VISIBLE: before} if before is not None else {})


def wait() -> None:
    """Until Ctrl-C. A server that died is started anew by Serve: said when it is seen."""
    from ray import serve
    well = True
    try:
        while True:
            time.sleep(LOOK_S)
            before, well = well, serve.status().applications[NAME].status == "RUNNING"
            if well != before:
                print(f"modip serve: {'it answers again' if well else 'the server died or hangs; Ray Serve starts it anew'}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        return


def direct(port: int) -> dict[str, str]:
    """Serve's settings for one replica that takes requests at `port` itself, in its one event loop, instead of behind a proxy process (docs/serve.md)."""
    return {"RAY_SERVE_ENABLE_DIRECT_INGRESS": "1", "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(port),
            "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(port + 1), "RAY_SERVE_PORT_QUARANTINE_S": "0",
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0", "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0"}


def free_port(host: str, port: int) -> int:
    """The port if nobody listens there, for 0 any free one. ConfigError where it cannot be had.

    What listens there starts seconds later. So a free one is of those that systems deal out to nobody by themselves, and Ray neither.
    """
    for number in [port] if port else random.sample(UNASSIGNED, 50):
        try:
            socket.create_server((host, number), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
            return number
        except (OSError, OverflowError) as error:
            problem = error
    raise ConfigError(f"--host {host} --port {port}: cannot listen there ({problem}); choose another, --port 0 takes a free one") from problem
