"""A Ray of one test module's own, started as a run starts its: one thread a process, and not niced behind the tests that run beside it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager

QUIET = {"log_to_driver": False, "logging_level": "ERROR"}


def surroundings() -> AbstractContextManager[None]:
    """Environment variables that Ray's processes inherit when they are started within."""
    from modip_ray.actors.cluster import NICENESS, environment
    return environment({"OMP_NUM_THREADS": "1", **NICENESS})


def private_ray(num_cpus: int = 4, variables: Mapping[str, str] | None = None, **options) -> AbstractContextManager[None]:
    """As a run of its own has it, with these options of ray.init; shut down when the block is left."""
    from modip_ray.actors.cluster import private_ray as private
    return private({"OMP_NUM_THREADS": "1", **(variables or {})}, num_cpus=num_cpus, **QUIET, **options)
