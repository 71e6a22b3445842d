"""Waiting for a system to come somewhere."""

import time
from collections.abc import Callable

from modip_ray.learning.system import Phase, Status, System

PATIENCE_S = 240.0                  # on a machine five times slower than a quiet one, too


def advance_until(system: System, phase: Phase = "online", ready: Callable[[Status, list[str]], bool] = lambda status, incidents: status.done,
                  ) -> tuple[Status, list[str]]:
    """The first status with which `ready` holds, and the incidents until then."""
    deadline, incidents = time.monotonic() + PATIENCE_S, []
    while True:
        status = system.advance(phase, 0.3, until=10**9)
        incidents += status.incidents
        if ready(status, incidents):
            return status, incidents
        assert time.monotonic() < deadline, (status, incidents, system.gauges())
