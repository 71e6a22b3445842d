"""A run of the normal command as a child process: watched by what it writes, harmed by process id, and nothing of it left behind."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from modip_ray.report.metrics import read_metrics
from tests.fakes import SMALL, write_data

ROOT = Path(__file__).resolve().parents[2]
MARK = "MODIP_CHAOS"                                    # inherited by all that a test starts, so that its processes are found again whoever adopts them
POLL_S = 0.05
START_S = 400.0                                         # longest wait for a run to come to work, on a busy machine
CALM = {"log.every_s": 0.5, "log.tensorboard": False, "log.ray_metrics": False, "eval.every_steps": 0, "log.checkpoint_every_s": 1e6,
        "resources.silent_s": 15.0, "log.grace_s": 25.0}
DEMO = CALM | {"data.transitions": 20_000, "pretrain.updates": 200, "pretrain.policy_updates": 200, "online.env_steps": 1_000_000,
               "online.min_online": 500}
POINT = SMALL | CALM | {"online.env_steps": 1_000_000, "replay.capacity": 20_000}


class ChaosError(AssertionError):
    """Something that a test waits for did not happen; the message has the end of the run's own output."""


def mark() -> None:
    os.environ[MARK] = str(os.getpid())


def marked() -> list[psutil.Process]:
    """Every live process that this one or its children started (itself not)."""
    word, found = f"{MARK}={os.getpid()}".encode(), []
    for process in psutil.process_iter():
        try:
            inherited = Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")      # empty of one that has ended and was not waited for
            if word in inherited and process.pid != os.getpid():
                found.append(process)
        except (psutil.NoSuchProcess, OSError):
            continue
    return found


def kill_marked() -> int:
    """SIGKILL for all of them; returns how many there were."""
    found = marked()
    for process in found:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(found, timeout=10)
    return len(found)


def settings_of(values: Mapping[str, Any]) -> list[str]:
    """key=value arguments of the command line."""
    return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items()]


class Run:
    """`python -m modip_ray train` in a run folder; started again with the same settings it resumes."""

    def __init__(self, path: Path, settings: Mapping[str, Any], config: str | None = None, environment: Mapping[str, str] | None = None):
        self.path, self.settings, self.config = path, dict(settings), config
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
        self.output = path.with_suffix(".log")
        self.process: subprocess.Popen | None = None
        self.killed: list[tuple[float, list[psutil.Process]]] = []      # when, and what ran then
        self.drivers: list[int] = []                    # process ids of all drivers so far
        self.earlier = 0                                # rows that earlier drivers wrote

    @property
    def command(self) -> list[str]:
        return ["train", *(["--config", self.config] if self.config else []), *settings_of(self.settings | {"run_dir": str(self.path)})]

    def start(self) -> Run:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.earlier = len(self.rows())
        with open(self.output, "a") as log:
            self.process = subprocess.Popen([sys.executable, "-m", "modip_ray", *self.command], cwd=ROOT, env=self.environment, stdin=subprocess.DEVNULL,
                                            stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        self.drivers.append(self.process.pid)
        return self

    def __enter__(self) -> Run:
        return self if self.process is not None else self.start()

    def __exit__(self, *exc: object) -> None:
        """However it ended: nothing of it stays."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        kill_marked()
        for pid in self.drivers:
            for folder in Path("/tmp").glob(f"modip_ray_{pid}_*"):
                shutil.rmtree(folder, ignore_errors=True)

    # ---- watching ----------------------------------------------------------------------------------------------------------------------------

    def rows(self, *kinds: str) -> list[dict]:
        """Rows of metrics.jsonl so far, of these kinds or of all."""
        try:
            rows = read_metrics(self.path)
        except FileNotFoundError:
            return []
        return [row for row in rows if not kinds or row["kind"] in kinds]

    def fresh(self, *kinds: str) -> list[dict]:
        """Those rows that the newest driver wrote."""
        return [row for row in self.rows()[self.earlier:] if not kinds or row["kind"] in kinds]

    def position(self) -> dict[str, int]:
        """The newest counters; zeros where the newest driver has written none yet."""
        rows = self.fresh("system")
        return {key: int(rows[-1][key]) if rows else 0 for key in ("env_steps", "updates", "policy_updates")}

    def gauge(self, name: str) -> float:
        """The newest value of a gauge; 0 where no row has it yet."""
        return next((float(row[name]) for row in reversed(self.fresh("system")) if row.get(name) is not None), 0.0)

    def incidents(self) -> list[str]:
        return [row["text"] for row in self.rows("incident")]

    def said(self) -> str:
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    def processes(self) -> dict[str, list[int]]:
        """Process ids by role, as the run tells them to the outside; those of its newest driver."""
        try:
            return json.loads((self.path / "live" / "processes.json").read_text())
        except FileNotFoundError:
            return {}

    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def wait(self, what: str, ready: Callable[[], Any], timeout_s: float = START_S) -> Any:
        """What `ready()` returns once that is true; ChaosError where the run ends or time is over before."""
        deadline = time.monotonic() + timeout_s
        while not (found := ready()):
            if not self.alive():
                raise ChaosError(f"waited for {what}, but the run ended with {self.process.returncode if self.process else None}: {self.tail()}")
            if time.monotonic() > deadline:
                raise ChaosError(f"waited {timeout_s:g} s for {what}: {self.tail()}")
            time.sleep(POLL_S)
        return found

    def wait_for_steps(self, env_steps: int = 1, timeout_s: float = START_S) -> None:
        self.wait(f"{env_steps:,} environment steps", lambda: self.position()["env_steps"] >= env_steps, timeout_s)

    def watch(self, seconds: float) -> None:
        """Let it work for so long; ChaosError where it ends before."""
        deadline = time.monotonic() + seconds
        self.wait("time to pass", lambda: time.monotonic() >= deadline, seconds + 10)

    def tail(self) -> str:
        return " | ".join(line for line in self.said().replace("\r", "\n").splitlines() if line.strip())[-1500:]

    # ---- ending ------------------------------------------------------------------------------------------------------------------------------

    def stop(self, timeout_s: float = 90.0) -> int:
        """SIGTERM, as a cluster manager sends it; the exit status."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            raise ChaosError(f"did not stop within {timeout_s:g} s of SIGTERM: {self.tail()}") from error

    def finish(self, timeout_s: float = 600.0) -> None:
        """Let it come to its end."""
        try:
            status = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            raise ChaosError(f"did not end within {timeout_s:g} s: {self.tail()}") from error
        if status:
            raise ChaosError(f"ended with exit status {status}: {self.tail()}")

    def kill_driver(self) -> None:
        """SIGKILL for the driver alone. What it had started is left to itself; `leavings` says how long that took."""
        before = marked()
        self.process.kill()
        self.process.wait()
        self.killed.append((time.monotonic(), before))

    def leavings(self, timeout_s: float) -> list[str]:
        """Names of processes of killed drivers that still run so long after the last kill."""
        at, left = max(at for at, _ in self.killed), [p for _, before in self.killed for p in before]
        _, alive = psutil.wait_procs(left, timeout=max(0.0, at + timeout_s - time.monotonic()))
        return sorted(p.name() for p in alive if p.status() != psutil.STATUS_ZOMBIE)


@dataclass
class Trial:
    """What a test gets: a folder, how much to do, its dice. What it leaves: figures, and which demands they do not meet."""

    folder: Path
    fast: bool
    seed: int
    figures: dict[str, Any] = field(default_factory=dict)
    missed: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.rng = random.Random(self.seed)

    def pick(self, fast: Any, full: Any) -> Any:
        return fast if self.fast else full

    def demand(self, holds: bool, what: str) -> None:
        if not holds:
            self.missed.append(what)

    def stop(self, run: Run) -> None:
        """SIGTERM, and the demand that every test ends with: it was one run all the time, and ended in order."""
        status = run.stop()
        self.figures["job_restarts"] = restarts = len(run.rows("resume"))
        self.demand(status == 0 and not restarts, f"exit status {status}, {restarts} restarts of the job")

    def demo(self, name: str, **settings: Any) -> Run:
        """The demo with a short offline phase and without end; its data are collected once for all tests that have episodes of the same length."""
        cache = self.folder.parent / f"demo_{settings.get('task__max_episode_steps', 1000)}.hdf5"
        return Run(self.folder / name, DEMO | {"data.cache": str(cache)} | dotted(settings), "demo")

    def point(self, name: str, **settings: Any) -> Run:
        """The tiny task of the tests, without end."""
        data = self.folder.parent / "point.hdf5"
        if not data.exists():
            data.parent.mkdir(parents=True, exist_ok=True)
            write_data(data)
        return Run(self.folder / name, POINT | {"data.source": str(data)} | dotted(settings))


def dotted(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key.replace("__", "."): value for key, value in settings.items()}


def hurt(pid: int, number: int = signal.SIGKILL) -> bool:
    """Send a signal; False where the process is gone already."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True
