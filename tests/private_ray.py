"""A Ray of one test module's own, started as a run starts its: one thread a process, and not niced behind the tests that run beside it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

QUIET = {"log_to_driver": False, "logging_level": "ERROR"}


def surroundings(**variables: str) -> AbstractContextManager[None]:
    """Environment variables that Ray's processes inherit when they are started within."""
    from modip_ray.actors.cluster import NICENESS, environment
    return environment({"OMP_NUM_THREADS": "1", **NICENESS, **variables})


@contextmanager
def private_ray(num_cpus: int = 4, variables: dict[str, str] | None = None, **options) -> Iterator[None]:
    """ray.init with these options; shut down when the block is left."""
    import ray

    from modip_ray.actors.cluster import start_private
    with surroundings(**(variables or {})):
        folder = start_private({"num_cpus": num_cpus, **QUIET, **options})
    try:
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
