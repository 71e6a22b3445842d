"""Ctrl-C and SIGTERM by real signals at every moment of a run: saved in time, exit 0, the line that resumes, nothing left behind."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from modip_ray.learning.checkpoint import newest
from modip_ray.report.metrics import read_metrics
from tests.fakes import SMALL, write_data

ROOT = Path(__file__).resolve().parents[2]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
LONG = {"pretrain.updates": 100_000, "log.checkpoint_every_s": 1000.0}
ONLINE = {"online.env_steps": 100_000, "pretrain.updates": 10, "pretrain.policy_updates": 10, "eval.every_steps": 0}
RAY = {"serial": False, "rollout.num_workers": 1}
#: Python that is run before the command, to hold it at a moment: it touches `reached` and waits there.
HOLD = "import time\ndef hold():\n    open({reached!r}, 'w').close()\n    time.sleep({seconds})\n"
WRAP = HOLD + "import {module} as m\nplain = m.{name}\ndef held(*a, **k):\n    hold()\n    return plain(*a, **k)\nm.{name} = held\n"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "data.hdf5")


class Forked:
    """What Popen would be, forked from a process that has imported torch already: that takes most of the time of a tiny run."""

    server = multiprocessing.get_context("forkserver")

    def __init__(self, code: str, words: list[str], log: Path):
        self.server.set_forkserver_preload(["modip_ray.run", "modip_ray.learning.serial"])
        self.process = self.server.Process(target=command, args=(code, words, log))
        self.process.start()
        self.pid = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float) -> int | None:
        self.process.join(timeout)
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


def command(code: str, words: list[str], log: Path) -> None:
    """In the forked process: `python -c code words...`, in a process group of its own."""
    os.setsid()
    os.chdir(ROOT)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["-c", *words]
    signal.signal(signal.SIGHUP, signal.SIG_DFL)                        # this suite may run under nohup, which a run keeps to
    exec(code, {"__name__": "__main__"})


class Run:
    """A run of the normal command, in a process group of its own as a shell would have it."""

    def __init__(self, folder: Path, data: Path, settings: dict, before: str = ""):
        self.folder, self.log = folder / "run", folder / "log"
        self.settings = {**SMALL, "run_dir": str(self.folder), "data.source": str(data), "serial": True, **settings}
        self.shm = shared_memory()
        code = before + "\nfrom modip_ray.cli import main\nmain()"
        words = ["train", *(f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in self.settings.items())]
        if self.settings["serial"]:
            self.process = Forked(code, words, self.log)
        else:
            self.process = subprocess.Popen([sys.executable, "-c", code, *words], cwd=ROOT, env=ENV, stdout=self.log.open("w"), stderr=subprocess.STDOUT,
                                            start_new_session=True)
        self.children: dict[int, psutil.Process] = {}

    def until(self, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 300
        while not ready():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)
        self.children = {p.pid: p for p in psutil.Process(self.process.pid).children(recursive=True)}

    def updates(self) -> int:
        return max((row.get("updates", 0) for row in read_metrics(self.folder)), default=0) if (self.folder / "metrics.jsonl").exists() else 0

    def online(self) -> bool:
        return (self.folder / "metrics.jsonl").exists() and any(row["kind"] == "train" and row["env_steps"] > 100 for row in read_metrics(self.folder))

    def ended(self, code: int, within_s: float = 120.0) -> str:
        """What it said, once it has ended as it should, with nothing of it left."""
        assert self.process.wait(within_s) == code, self.log.read_text()
        gone, alive = psutil.wait_procs(list(self.children.values()), timeout=120)
        assert not alive, f"left behind: {[p.cmdline() for p in alive]}"
        assert not left_behind(self.shm), "shared memory is left behind"
        assert not list(Path("/tmp").glob(f"modip_ray_{self.process.pid}_*")), "a session folder is left behind"
        text = self.log.read_text()
        assert "Traceback" not in text, text
        return text


def shared_memory() -> set[str]:
    """Files of shared memory, whoever has them."""
    return {str(p) for p in Path("/dev/shm").iterdir()}


def left_behind(before: set[str]) -> set[str]:
    """New files of shared memory that no living process has. Another run of this machine may end while it is looked at, so what is its goes by itself."""
    deadline = time.monotonic() + 60
    while (left := shared_memory() - before) and (left := left - others()) and time.monotonic() < deadline:
        time.sleep(0.5)
    return left


def others() -> set[str]:
    """Those that some living process maps or holds: other runs of this machine."""
    found = set()
    for process in psutil.process_iter():
        try:
            found |= {m.path for m in process.memory_maps() if m.path.startswith("/dev/shm")} | {f.path for f in process.open_files() if "/dev/shm" in f.path}
        except psutil.Error:
            continue
    return {path.removesuffix(" (deleted)") for path in found}


@pytest.mark.parametrize("moment", ["data", "start", "pretraining", "online", "evaluation", "checkpoint"])
def test_a_serial_run_stops_in_good_order_at_every_moment(tmp_path, data, moment):
    """Held at the moment by a function that takes long there."""
    reached = tmp_path / "reached"
    slow = {"data": ("modip_ray.learning.offline_data", "read_any", 200), "start": ("modip_ray.learning.serial", "agent_of", 200),
            "evaluation": ("modip_ray.learning.evaluation", "run_job", 200), "checkpoint": ("modip_ray.learning.serial", "write_state", 0.3)}
    if moment in slow:
        module, name, seconds = slow[moment]
        before = WRAP.format(reached=str(reached), module=module, name=name, seconds=seconds)
    else:
        before = ""
    run = Run(tmp_path, data, LONG if moment == "pretraining" else ONLINE | {"eval.every_steps": 200 if moment == "evaluation" else 0}, before)
    run.until({"pretraining": run.updates, "online": run.online}.get(moment, reached.exists))
    signals = {"data": signal.SIGTERM, "online": signal.SIGTERM, "pretraining": signal.SIGHUP}         # SIGHUP: the terminal is closed
    os.kill(run.process.pid, signals.get(moment, signal.SIGINT))
    said = run.ended(0)
    assert "the same command resumes" in said and f"run_dir={run.folder}" in said
    saved = newest(run.folder / "checkpoints")
    if moment in ("data", "start"):
        assert saved is None
    else:
        assert saved.counters["updates"] > 0 and saved.counters["phase"] == ("online" if moment in ("online", "checkpoint") else "pretrain")


def test_a_second_ctrl_c_stops_at_once_and_a_checkpoint_that_takes_too_long_is_given_up(tmp_path, data):
    reached = tmp_path / "reached"
    before = WRAP.format(reached=str(reached), module="modip_ray.learning.serial", name="write_state", seconds=200)
    run = Run(tmp_path, data, LONG, before)
    run.until(run.updates)
    run.process.send_signal(signal.SIGINT)
    run.until(reached.exists)
    run.process.send_signal(signal.SIGINT)
    assert "interrupted; the same command resumes" in run.ended(130, within_s=100)

    (tmp_path / "again").mkdir()
    run = Run(tmp_path / "again", data, LONG | {"log.grace_s": 1.0}, before)
    run.until(run.updates)
    run.process.send_signal(signal.SIGTERM)
    assert "not written within 1 s (log.grace_s)" in run.ended(2, within_s=100)


@pytest.mark.ray
def test_sigterm_to_the_whole_group_saves_on_ray_and_nothing_stays(tmp_path, data):
    """As `timeout` and batch systems send it: Ray's processes must live until the checkpoint is written, and not a moment longer than the run."""
    run = Run(tmp_path, data, ONLINE | RAY)
    run.until(run.online)
    assert len(run.children) > 5
    os.killpg(run.process.pid, signal.SIGTERM)
    assert "the same command resumes" in run.ended(0)
    saved = newest(run.folder / "checkpoints")
    assert saved.counters["phase"] == "online" and saved.counters["env_steps"] > 100


@pytest.mark.ray
def test_two_ctrl_c_on_ray_end_it_at_once_and_nothing_stays(tmp_path, data):
    """The second while the driver saves: sent sooner, both could be one to a driver that waits for Ray."""
    reached = tmp_path / "reached"
    run = Run(tmp_path, data, LONG | RAY, WRAP.format(reached=str(reached), module="modip_ray.session", name="begin", seconds=200))
    run.until(run.updates)
    os.killpg(run.process.pid, signal.SIGINT)
    run.until(reached.exists)
    assert len(run.children) > 5
    os.killpg(run.process.pid, signal.SIGINT)
    assert "interrupted" in run.ended(130, within_s=60)
