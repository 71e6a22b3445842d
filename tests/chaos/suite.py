"""The tests by name, in the order in which they run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.chaos.configs import check_configs
from tests.chaos.damage import check_damage
from tests.chaos.disk import check_disk
from tests.chaos.driver import check_driver
from tests.chaos.environments import check_environments
from tests.chaos.frozen import check_frozen
from tests.chaos.harness import Trial
from tests.chaos.nodes import check_nodes
from tests.chaos.roles import check_roles
from tests.chaos.serial import check_serial
from tests.chaos.soak import check_soak
from tests.chaos.together import check_together
from tests.chaos.workers import check_workers


def disk(trial: Trial) -> None:
    trial.folder.mkdir(parents=True)
    found(trial, check_disk(trial.folder, with_ray=not trial.fast))


def damage(trial: Trial) -> None:
    found(trial, check_damage(trial.pick(20, 100), trial.seed))


def configs(trial: Trial) -> None:
    found(trial, check_configs(trial.pick(30, 300), trial.seed))


def found(trial: Trial, figures: dict[str, Any]) -> None:
    """Figures of a check that says by itself what is not as it should be."""
    trial.figures |= figures
    for finding in figures["findings"]:
        trial.demand(False, str(finding))


TESTS: dict[str, Callable[[Trial], None]] = {
    "workers": check_workers, "roles": check_roles, "driver": check_driver, "serial": check_serial, "nodes": check_nodes, "frozen": check_frozen,
    "environments": check_environments, "disk": disk, "damage": damage, "configs": configs, "soak": check_soak,
}
FAST_ONLY: dict[str, Callable[[Trial], None]] = {"together": check_together}
TOGETHER = ("workers", "roles", "frozen", "soak")       # the tests that it stands for
LANES = (("together", "nodes", "disk"), ("driver", "serial", "environments", "damage", "configs"))      # of the fast suite, side by side
