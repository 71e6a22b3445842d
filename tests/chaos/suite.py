"""The tests by name, in the order in which they run."""

from __future__ import annotations

from collections.abc import Callable

from tests.chaos.driver import check_driver
from tests.chaos.harness import Trial

TESTS: dict[str, Callable[[Trial], None]] = {"driver": check_driver}
