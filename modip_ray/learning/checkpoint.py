"""Checkpoints: a folder for each, one npz file a component, and a `done` marker with every file's sha256 that is written last. No pickle."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

State = dict[str, np.ndarray]
DONE, COUNTERS = "done", "counters.json"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used; the message names the file and what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete and verified checkpoint folder."""

    path: Path
    counters: dict[str, Any]

    def has(self, component: str) -> bool:
        return (self.path / f"{component}.npz").is_file()

    def read(self, component: str) -> State:
        return read_state(self.path / f"{component}.npz")


def write_state(folder: Path, component: str, state: Mapping[str, np.ndarray]) -> None:
    """Write one component's arrays into a folder from `begin`; flushed to the disk."""
    with open(folder / f"{component}.npz", "wb") as file:
        np.savez(file, **state)
        file.flush()
        os.fsync(file.fileno())


def read_state(path: Path) -> State:
    """Arrays of an npz file; CheckpointError when it is no plain npz (objects, which could run code, are refused)."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path}: cannot be read as a plain npz file ({error}); delete its folder to use the checkpoint before") from error


def name_of(env_steps: int, updates: int) -> str:
    return f"step_{env_steps:09d}_u{updates:07d}"


def begin(root: Path, env_steps: int, updates: int) -> Path:
    """An empty folder to write components into; it is no checkpoint before `commit`."""
    folder = root / f".partial_{name_of(env_steps, updates)}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def commit(folder: Path, counters: Mapping[str, Any], keep: int) -> Path:
    """Counters and the marker into the folder, then its final name at once; older checkpoints than the newest `keep` go."""
    (folder / COUNTERS).write_text(json.dumps(counters, indent=1))
    sums = {p.name: sha256(p) for p in sorted(folder.iterdir())}
    write_synced(folder / DONE, json.dumps(sums, indent=1))
    final = folder.with_name(folder.name.removeprefix(".partial_"))
    if final.exists():                                                              # the same counters, saved again
        shutil.rmtree(final)
    os.replace(folder, final)
    sync_folder(final.parent)
    for old in folders(final.parent)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def folders(root: Path) -> list[Path]:
    """Checkpoint folders, newest first (whether they are sound or not)."""
    return sorted((p for p in root.glob("step_*_u*") if p.is_dir()), reverse=True) if root.is_dir() else []


def newest(root: Path) -> Checkpoint | None:
    """The newest sound checkpoint; damaged ones before it are named on stderr. None where there is no checkpoint at all.

    CheckpointError when there are checkpoints but none can be used: a run never silently starts again from zero.
    """
    found = folders(root)
    problems = []
    for folder in found:
        try:
            checkpoint = verified(folder)
        except CheckpointError as error:
            problems.append(str(error))
            print(f"modip: damaged checkpoint passed over: {error}", file=sys.stderr)
            continue
        if problems:
            print(f"modip: going on from the older checkpoint {folder}", file=sys.stderr)
        return checkpoint
    if found:
        raise CheckpointError(f"{root}: none of {len(found)} checkpoint(s) can be used ({'; '.join(problems)}); "
                              "restore one, or remove the folder to start again from zero")
    return None


def verified(folder: Path) -> Checkpoint:
    """A checkpoint whose files all have the sums that its marker says; CheckpointError names the first that has not."""
    try:
        sums = json.loads((folder / DONE).read_text())
        counters = json.loads((folder / COUNTERS).read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder}: is not complete, {Path(error.filename).name!r} is missing") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: marker or counters cannot be read ({error})") from error
    if not isinstance(sums, dict) or not isinstance(counters, dict) or COUNTERS not in sums:
        raise CheckpointError(f"{folder}: marker or counters are not what this program writes")
    for name, expected in sums.items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise CheckpointError(f"{path}: is missing")
        if sha256(path) != expected:
            raise CheckpointError(f"{path}: its sha256 is not the one of the marker, the file is damaged")
    return Checkpoint(folder, counters)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_synced(path: Path, text: str) -> None:
    """Text to a file that appears complete or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
