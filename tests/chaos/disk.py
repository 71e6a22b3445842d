"""Disks that are full, read-only or no disk at all, and an object store without room: a clear error or none, and the last checkpoint intact.

    python -m tests.chaos.disk
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from modip_ray.learning.checkpoint import folders, newest
from tests.fakes import SMALL, write_data

ROOT = Path(__file__).resolve().parents[2]
ENV = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}          # beside what is inherited
PATIENCE_S = 300.0
ROOM = "48m"                        # of the disk that is to be full
NEW_MOUNTS = ["unshare", "--user", "--map-root-user", "--mount"]      # a file system of one's own needs no privilege there
SETTINGS = {"serial": True, "pretrain.updates": 40, "pretrain.policy_updates": 40, "online.env_steps": 10**6, "eval.every_steps": 0,
            "log.checkpoint_every_s": 0.2}


def check_disk(scratch: Path, with_ray: bool = True) -> dict[str, Any]:
    """Figures by fault; `findings` says what was not as it should be."""
    data, findings = write_data(scratch / "data.hdf5", 300), []
    file = scratch / "file"
    file.write_text("no folder")
    figures: dict[str, Any] = {"own_mounts": own_mounts(scratch)}
    for name, run_dir in (("run_dir is a file", file), ("run_dir below a file", file / "run")):
        figures[name] = said = clear(command(data, run_dir))
        if "run_dir" not in said:
            findings.append(f"{name}: {said}")
    for serial in (True, False) if with_ray else (True,):
        for fault in ("full", "read-only"):
            name = f"{fault}, {'serial' if serial else 'Ray'}"
            args = [sys.executable, "-m", "tests.chaos.disk", "--inside", fault, str(scratch / f"{fault}-{serial}"), str(data), str(serial)]
            done = run_to_end([*(NEW_MOUNTS if figures["own_mounts"] else []), *args], 2 * PATIENCE_S)
            if done.returncode:
                findings.append(f"{name}: {done.stderr[-1000:]}")
                continue
            figures[name] = found = json.loads(done.stdout.splitlines()[-1])
            if not (found["clear"] and found["intact"] and found["resumed"]):
                findings.append(f"{name}: {found}")
    if with_ray and figures["own_mounts"]:
        figures["object store without room"] = said = no_room_in_shared_memory(scratch, data)
        if said != "ran":
            findings.append(f"object store without room: {said}")
    return {**figures, "findings": findings}


def own_mounts(scratch: Path) -> bool:
    """Whether this user may mount a small disk that only a process and its children see; else a limit on the size of files stands in for it."""
    try:
        return not subprocess.run([*NEW_MOUNTS, "mount", "-t", "tmpfs", "tmpfs", str(scratch)], capture_output=True, timeout=30).returncode
    except FileNotFoundError:
        return False


def command(data: Path, run_dir: Path, **dotted: Any) -> list[str]:
    settings = SMALL | SETTINGS | {"data.source": str(data), "run_dir": str(run_dir)} | {k.replace("__", "."): v for k, v in dotted.items()}
    return [sys.executable, "-m", "modip_ray", "train", *(f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in settings.items())]


def run_to_end(args: list[str], timeout_s: float = PATIENCE_S) -> subprocess.CompletedProcess:
    return subprocess.run(args, cwd=ROOT, env=os.environ | ENV, capture_output=True, text=True, timeout=timeout_s)


def clear(args: list[str]) -> str:
    """The one line that a command ended with, exit status 2; anything else is what it says."""
    done = run_to_end(args)
    return verdict(done.returncode, done.stderr)


def verdict(code: int, text: str) -> str:
    lines = [line for line in text.splitlines() if line.startswith("modip train: ")]
    return lines[0] if code == 2 and len(lines) == 1 and "Traceback" not in text else f"exit {code}: {text[-1500:]}"


def inside(fault: str, folder: Path, data: Path, serial: bool) -> dict[str, Any]:
    """A run whose disk becomes full or read-only after its first online checkpoints, and resumes once there is room again."""
    folder.mkdir(parents=True)
    mounted = not subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", str(folder)], capture_output=True).returncode
    run, log = folder / "run", Path(tempfile.mkdtemp(prefix="disk_")) / "log"
    args = command(data, run, serial=serial)
    process = subprocess.Popen(args, cwd=ROOT, env=os.environ | ENV, stdout=log.open("w"), stderr=subprocess.STDOUT)
    wait_for(lambda: any("u0000040" not in p.name for p in folders(run / "checkpoints")) and len(folders(run / "checkpoints")) > 1, process, log)
    mend = spoil(fault, folder, process.pid, mounted)
    code = process.wait(PATIENCE_S)
    said = verdict(code, log.read_text())
    mend()
    saved = newest(run / "checkpoints")
    steps = saved.counters["env_steps"]
    again = run_to_end(command(data, run, serial=serial, online__env_steps=steps + 40))
    return {"by": "tmpfs" if mounted else "limit on the size of files", "said": said, "clear": said.startswith("modip train: "), "intact": saved is not None,
            "env_steps": steps, "resumed": again.returncode == 0 or again.stderr[-500:]}


def spoil(fault: str, folder: Path, pid: int, mounted: bool) -> Callable[[], Any]:
    """Make the disk full or read-only for the run; returns what undoes it."""
    if not mounted:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (1000, 1000))                  # for good, but for this process only
        return lambda: None
    if fault == "read-only":
        remount(folder, "ro")
        return lambda: remount(folder, "rw")
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
    return filler.unlink


def remount(folder: Path, how: str) -> None:
    """Read-only needs that nobody has a file open for writing; a bind mount over the folder does not."""
    if how == "ro":
        subprocess.run(["mount", "--bind", str(folder), str(folder)], check=True)
        subprocess.run(["mount", "-o", "remount,ro,bind", str(folder)], check=True)
    else:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def no_room_in_shared_memory(scratch: Path, data: Path) -> str:
    """A whole run on Ray where /dev/shm has 32 MB: "ran", or what it said."""
    shell = f"mount -t tmpfs -o size=32m tmpfs /dev/shm && exec {' '.join(map(repr, command(data, scratch / 'shm', serial=False, online__env_steps=100)))}"
    done = run_to_end([*NEW_MOUNTS, "sh", "-c", shell])
    return "ran" if done.returncode == 0 else verdict(done.returncode, done.stderr)


def wait_for(ready: Callable[[], bool], process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not ready():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the run never came so far: {log.read_text()[-2000:]}")
        time.sleep(0.02)


if __name__ == "__main__":
    top = argparse.ArgumentParser(description=__doc__)
    top.add_argument("--inside", nargs=4, metavar=("FAULT", "FOLDER", "DATA", "SERIAL"), help="one fault, in mounts of one's own")
    top.add_argument("--serial-only", action="store_true")
    given = top.parse_args()
    if given.inside:
        fault_, folder_, data_, serial_ = given.inside
        print(json.dumps(inside(fault_, Path(folder_), Path(data_), serial_ == "True")))
    else:
        with tempfile.TemporaryDirectory(prefix="disk_") as scratch_:
            print(json.dumps(check_disk(Path(scratch_), not given.serial_only), indent=1))
