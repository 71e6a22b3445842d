"""For all tests."""

import signal
from pathlib import Path

import pytest


def pytest_configure(config):
    """A shell that starts us in the background has us ignore Ctrl-C, and our child processes would inherit that."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    """Files that start Ray come first: they take longest, and those of milliseconds fill the gaps of the last (pytest-xdist hands out files in this order)."""
    slow = {item.path for item in items if item.get_closest_marker("ray")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> Path:
    """The folder of a tiny finished run; only to be read."""
    from modip_ray.run import train
    from tests.fakes import small, write_data
    folder = tmp_path_factory.mktemp("finished")
    train(small(folder / "run", write_data(folder / "data.hdf5"), serial=True, online__env_steps=60, eval__every_steps=0, policy__n_action_steps=2))
    return folder / "run"
