"""A run's folder: who may write to it, which settings it was started with, what is in it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TextIO

import yaml

from modip_ray.config import Config, ConfigError, read_yaml
from modip_ray.config.fields import build
from modip_ray.config.files import defaults
from modip_ray.config.rules import shown
from modip_ray.config.tree import merge
from modip_ray.learning.checkpoint import Checkpoint, CheckpointError, best, newest, write_synced
from modip_ray.learning.mirror import Mirror
from modip_ray.oneline import first_line
from modip_ray.report.rundata import flatten

FREE = ("run_dir", "serial", "resources.", "log.", "eval.", "online.env_steps", "rollout.num_workers", "rollout.env_timeout_s",
        "rollout.max_env_failures", "planner.replicas")    # may differ when a run goes on
LOCK = ".lock"                      # of the process that works in a folder; stays there
AGAIN = "give the same command again"
OFFLINE_PHASES = ("data", "pretrain")
PACKAGES = ("torch", "numpy", "ray", "gymnasium", "mujoco")


class RunError(RuntimeError):
    """A run that cannot go on; the message says what to do."""


UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


@contextmanager
def disk_errors(folder: Path, then: str = "the same command goes on from the last checkpoint") -> Iterator[None]:
    """In the block, a full, read-only or broken disk is a RunError; then: what its mending comes to."""
    try:
        yield
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        raise RunError(f"{error.filename or folder}: cannot be written ({os.strerror(error.errno)}); make room or give access, and {then}") from error


@contextmanager
def mirror_errors(address: str) -> Iterator[None]:
    """In the block, what goes wrong on the way from a mirror (a network, rights) is a RunError."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{address}: cannot be read ({first_line(error)}); check the address, the network and the credentials, which come from the environment "
                       "as the storage's own tools take them, and give the same command again") from error


class RoleLost(RunError):
    """One of its processes is beyond help; the others still answer."""


def run_path(cfg: Config) -> Path:
    return Path(os.path.expanduser(cfg.run_dir)) if cfg.run_dir else Path("runs") / f"{cfg.task.name}-{time.strftime('%Y%m%d-%H%M%S')}"


class RunFolder:
    """Opens (or makes) the folder, refuses a second writer and settings that differ from those it was started with."""

    def __init__(self, cfg: Config):
        self.cfg, self.path = cfg, run_path(cfg).resolve()
        self.lock = locked(self.path, "run_dir", "another process is training in this folder; wait for it, stop it, or use another run_dir")
        self.checkpoint: Checkpoint | None = None
        try:
            self.open()
        except BaseException:
            self.lock.close()                                                       # a notebook keeps the exception, and this object with it
            raise

    def open(self) -> None:
        cfg = self.cfg
        if cfg.log.mirror is not None:
            self.restore(cfg.log.mirror)
        earlier = saved_config_tree(self.path)
        if earlier is None and (self.path / "checkpoints").is_dir():
            raise RunError(f"{self.path}: holds checkpoints but no config.yaml; restore it, or use another run_dir")
        if earlier is not None and self.begun():
            check_same(earlier, cfg, self.path)
        self.checkpoint = newest(self.checkpoints, set_aside=True)
        with disk_errors(self.path):
            self.set_journal_aside()
            write_synced(self.path / "config.yaml", cfg.dump())

    def set_journal_aside(self) -> None:
        """Where pre-training begins or goes on, what a journal holds of an online phase has no place: its BC policy would have been trained on it."""
        journal, phase = self.path / "journal", self.checkpoint.counters.get("phase") if self.checkpoint is not None else "data"
        if phase in OFFLINE_PHASES and any(part.stat().st_size for part in journal.glob("*/part_*")):
            os.replace(journal, aside := self.path / f"set_aside_journal_{time.time_ns()}")
            print(f"modip: there is no checkpoint of the online phase, so the run begins that anew; what was collected before is in {aside}", file=sys.stderr)

    def begun(self) -> bool:
        """There is something that its settings have decided; a run that ended at its data's name has nothing yet."""
        return any((self.path / name).exists() for name in ("checkpoints", "offline", "data.hdf5", "summary.json"))

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def restore(self, address: str) -> None:
        """What the mirror has of the run, into a folder that has nothing yet (log.mirror). ConfigError where the mirror is of other settings."""
        mirror = Mirror(address)
        mirror.check()
        if (self.path / "config.yaml").exists():
            return
        with mirror_errors(address):
            text = mirror.read("config.yaml")
        if text is not None:
            check_same(yaml.safe_load(text), self.cfg, address)
        with mirror_errors(address):
            found = mirror.pull(self.path, disk_errors)
        if found is not None:
            print(f"restored from {address}: checkpoint {found.path.name}", flush=True)

    def finished_summary(self) -> dict | None:
        """The summary of a run that these very settings have finished."""
        summary = read_summary(self.path)
        return summary if summary is not None and summary.get("config_hash") == self.cfg.hash() else None

    def write_summary(self, summary: dict) -> None:
        write_synced(self.path / "summary.json", json.dumps(summary, indent=1))

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *exc: object) -> None:
        self.lock.close()


def locked(folder: Path, setting: str, busy: str) -> TextIO:
    """The lock of a folder, which is made if need be; it is this process's alone until it is closed. RunError where it cannot be had.

    setting : what names the folder; busy: what is said where another process has the lock
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = open(folder / LOCK, "w")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            handle.close()
            raise RunError(f"{folder}: {busy}") from error
    except (OSError, ValueError) as error:                                          # ValueError: a name that no file can have
        raise RunError(f"{setting}: {shown(str(folder))} cannot be made or written ({error}); choose another {setting}") from error
    return handle


def is_open(path: Path) -> bool:
    """Whether a process holds the run's lock: one of this machine, or of another that shares the file system's locks. Tried, and given back at once."""
    try:
        with open(path / LOCK) as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def read_summary(path: Path) -> dict | None:
    try:
        summary = json.loads((path / "summary.json").read_text())
    except FileNotFoundError:
        return None
    except NotADirectoryError as error:
        raise RunError(f"{path}: is a file; expected a run folder") from error
    except ValueError as error:
        raise RunError(f"{path / 'summary.json'}: is not JSON ({error}); delete it, and the same command evaluates again") from error
    if not isinstance(summary, dict):
        raise RunError(f"{path / 'summary.json'}: is not what a run writes ({type(summary).__name__}); delete it, and the same command evaluates again")
    return summary


def saved_config_tree(path: Path) -> dict | None:
    """config.yaml of a run folder as plain data; None where there is none yet."""
    if path.exists() and not path.is_dir():
        raise RunError(f"{path}: is a file; expected a run folder")
    return read_yaml(path / "config.yaml") if (path / "config.yaml").exists() else None


def saved_config(path: Path) -> Config:
    """The settings of an existing run."""
    tree = saved_config_tree(path)
    if tree is None:
        raise RunError(f"{path}: no config.yaml there; expected a run folder as written by 'modip train run_dir=...'")
    return build(with_defaults(tree, path))


def with_defaults(saved: dict, path: Path) -> dict:
    """A saved tree, with the defaults of settings that did not exist when it was saved."""
    tree = defaults()
    merge(tree, saved, str(path / "config.yaml"))
    return tree


Which = Literal["newest", "best"]


def open_checkpoint(path: Path, which: Which = "newest") -> Checkpoint:
    """A run's newest checkpoint, or the best one by its periodic evaluations, which holds what acting needs."""
    if which not in ("newest", "best"):
        raise ConfigError(f"checkpoint: got {which!r}, expected newest or best")
    checkpoint = (newest if which == "newest" else best)(path / "checkpoints")
    if checkpoint is None and which == "best":
        raise CheckpointError(f"{path}: has no best checkpoint: it is kept by log.keep_best from the first periodic evaluation (eval.every_steps) on")
    if checkpoint is None:
        raise CheckpointError(f"{path}: has no checkpoint yet; train first (a checkpoint is written at the end of each phase)")
    return checkpoint


def check_same(earlier: dict, cfg: Config, path: Path | str) -> None:
    """ConfigError naming the settings that decide results and differ from those the folder was started with."""
    old, new = flatten(with_defaults(earlier, Path(path))), flatten(cfg.to_dict())
    differing = [k for k in sorted(set(old) | set(new)) if old.get(k) != new.get(k) and not k.startswith(FREE)]
    if differing:
        shown = "; ".join(f"{k}: {old.get(k)!r} -> {new.get(k)!r}" for k in differing[:6])
        more = f" and {len(differing) - 6} more" if len(differing) > 6 else ""
        raise ConfigError(f"{path}: was started with other settings ({shown}{more}); use another run_dir, or the settings as they were")


def command_line() -> str:
    """What was typed, less the folder of an installed script; it can be pasted into a shell."""
    name = Path(sys.argv[0]).name
    if name.endswith(".py"):
        name = "python -m modip_ray" if name == "__main__.py" else f"python {shlex.quote(sys.argv[0])}"
    return " ".join([name, shlex.join(sys.argv[1:])]).rstrip()


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("modip_ray", *PACKAGES):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str:
    """Commit of the checkout that this code runs from, "+changes" behind it where files differ; "unknown" for an installed package."""
    here = Path(__file__).resolve().parent

    def git(*args: str) -> str:
        return subprocess.run(["git", "-C", str(here), *args], capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    try:
        git("ls-files", "--error-unmatch", "runfolder.py")
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no", "--", str(here.parent)) else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def machine() -> dict[str, Any]:
    return {"platform": platform.platform(), "cpus": os.cpu_count(), "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)}


def rss_mb() -> float:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
