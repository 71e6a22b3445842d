"""The tests by name, in the order in which they run."""

from __future__ import annotations

from collections.abc import Callable

from tests.chaos.driver import check_driver
from tests.chaos.environments import check_environments
from tests.chaos.frozen import check_frozen
from tests.chaos.harness import Trial
from tests.chaos.nodes import check_nodes
from tests.chaos.roles import check_roles
from tests.chaos.serial import check_serial
from tests.chaos.soak import check_soak
from tests.chaos.workers import check_workers

TESTS: dict[str, Callable[[Trial], None]] = {
    "workers": check_workers, "roles": check_roles, "driver": check_driver, "serial": check_serial, "nodes": check_nodes, "frozen": check_frozen,
    "environments": check_environments, "soak": check_soak,
}
