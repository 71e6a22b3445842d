"""For all tests."""

import fcntl
import os
import signal
from pathlib import Path

import pytest


def pytest_configure(config):
    """A shell that starts us in the background has us ignore Ctrl-C, and our child processes would inherit that."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


#: The longest files, longest first (pytest --durations=0 says which they are), but so that the three that begin do not all start a Ray.
FIRST = ("test_tune_search.py", "actors/test_faults.py", "learning/test_learner.py", "test_jobs.py", "actors/test_elastic.py", "e2e/test_run.py",
         "actors/test_ranks.py", "test_tune.py", "actors/test_metrics.py", "cluster/test_local.py", "e2e/test_signals.py", "actors/test_system.py",
         "test_export.py", "test_serve.py", "baselines/test_dppo.py", "study/test_study.py", "test_bench.py", "report/test_status.py",
         "model/test_hardware.py")


def pytest_collection_modifyitems(items):
    """Long files come first, then others that start Ray; those of milliseconds fill the gaps of the last (pytest-xdist hands out files in this order)."""
    here, ray = Path(__file__).parent, {item.path for item in items if item.get_closest_marker("ray")}
    at = {here / name: i for i, name in enumerate(FIRST)}
    items.sort(key=lambda item: (at.get(item.path, len(at)), item.path not in ray))


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> Path:
    """The folder of a tiny finished run, which all of pytest-xdist's processes have in common; only to be read."""
    from modip_ray.run import train
    from tests.fakes import small, write_data
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "finished"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "run" / "summary.json").exists():
            train(small(folder / "run", write_data(folder / "data.hdf5"), serial=True, online__env_steps=60, eval__every_steps=0, policy__n_action_steps=2))
    return folder / "run"
