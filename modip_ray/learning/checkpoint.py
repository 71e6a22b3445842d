"""Checkpoints: a folder for each, one safetensors file a component, and a `done` marker with every file's sha256 that is written last. No pickle.

Format 2 (FORMAT in the marker): components are safetensors. Format 1 had npz files and a marker of bare sums; it is still read. Components may write
any other files into the folder of `begin`: `commit` hashes all that it finds there.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import time
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

State = dict[str, np.ndarray]
DONE, COUNTERS = "done", "counters.json"
FORMAT = 2
PARTIAL, BEST = ".partial", "best_"
NAME = re.compile(r"step_(\d+)_u(\d+)(?:\.(\d+))?")
ACTING = ("learner_", "bc", COUNTERS)    # what a checkpoint's files that acting needs begin with


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used; the message names the file and what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete and verified checkpoint folder."""

    path: Path
    counters: dict[str, Any]

    def file(self, component: str) -> Path | None:
        """Where a component's arrays are; None where the checkpoint has no such component."""
        return next((path for suffix in ("safetensors", "npz") if (path := self.path / f"{component}.{suffix}").is_file()), None)

    def has(self, component: str) -> bool:
        return self.file(component) is not None

    def read(self, component: str) -> State:
        path = self.file(component)
        if path is None:
            raise CheckpointError(f"{self.path}: has no component {component!r}; it holds {', '.join(sorted(p.name for p in self.path.iterdir()))}")
        return read_state(path)


def write_state(folder: Path, component: str, state: Mapping[str, np.ndarray]) -> None:
    """Write one component's arrays into a folder from `begin`; flushed to the disk."""
    path = folder / f"{component}.safetensors"
    dense = {key: np.ascontiguousarray(value) if np.ndim(value) else np.asarray(value) for key, value in state.items()}      # it takes memory as it lies
    try:
        save_file(dense, path)
        sync(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be written ({error}); make room there, and the same command goes on from the last checkpoint") from error


def read_state(path: Path) -> State:
    """Arrays of a component's file; CheckpointError when it is not what this program writes (pickled objects, which could run code, are refused)."""
    try:
        if path.suffix == ".npz":                                                   # format 1; text is kept as bytes since
            with np.load(path, allow_pickle=False) as file:
                return {key: as_bytes(str(v)) if (v := file[key]).dtype.kind == "U" else v for key in file.files}
        return load_file(path)
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read as plain arrays ({error}); delete its folder to use the checkpoint before") from error


def as_bytes(text: str) -> np.ndarray:
    """Text as an array (n,) of bytes, for a component's state; `.tobytes().decode()` gives it back."""
    return np.frombuffer(text.encode(), np.uint8)


def name_of(env_steps: int, updates: int) -> str:
    return f"step_{env_steps:09d}_u{updates:07d}"


def begin(root: Path, name: str = PARTIAL) -> Path:
    """An empty folder to write components into; it is no checkpoint before `commit`."""
    folder = root / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def commit(folder: Path, counters: Mapping[str, Any], keep: int) -> Path:
    """Counters and the marker into the folder, then its final name at once; older checkpoints than the newest `keep` go."""
    final = folder.with_name(name_of(counters["env_steps"], counters["updates"]))
    before = [again for *counts, again in (order(p.name) for p in folders(final.parent)) if counts == [counters["env_steps"], counters["updates"]]]
    if before:                                                                      # the same counters, saved again
        final = final.with_name(f"{final.name}.{before[0] + 1}")
    seal(folder, counters, final)
    for old in folders(final.parent)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def seal(folder: Path, counters: Mapping[str, Any], final: Path) -> None:
    """Make a folder of components a checkpoint named `final`."""
    write_synced(folder / COUNTERS, json.dumps(counters, indent=1))
    sums = {p.name: sha256(p) for p in sorted(folder.iterdir())}
    write_synced(folder / DONE, as_json({"format": FORMAT, "files": sums}))
    os.replace(folder, final)
    sync(final.parent)


def as_json(value: object) -> str:
    return json.dumps(value, indent=1)


def stage_best(checkpoint: Path) -> Path:
    """Copy what acting needs (not the replay) of a checkpoint that may prove the best; `commit_best` keeps it."""
    folder = begin(checkpoint.parent, ".candidate")
    for path in checkpoint.iterdir():
        if path.name.startswith(ACTING):
            shutil.copyfile(path, folder / path.name)
            sync(folder / path.name)
    return folder


def commit_best(folder: Path, score: float) -> Path:
    """Keep a staged checkpoint as the best one, in place of the one before."""
    counters = json.loads((folder / COUNTERS).read_text())
    final = folder.with_name(f"{BEST}{name_of(counters['env_steps'], counters['updates'])}")
    before = [p for p in folder.parent.glob(f"{BEST}*") if p != final]
    shutil.rmtree(final, ignore_errors=True)
    seal(folder, counters | {"score": score}, final)
    for path in before:
        shutil.rmtree(path, ignore_errors=True)                                     # where that is not finished, `best` passes over what is left
    return final


def best(root: Path) -> Checkpoint | None:
    """The best checkpoint by its periodic evaluation (log.keep_best), for acting only; None where there is none. CheckpointError where all are damaged."""
    found, problems = [], []
    for path in root.glob(f"{BEST}*"):
        try:
            found.append(verified(path))
        except CheckpointError as error:                                            # an older one, whose removal a kill cut short
            problems.append(error)
    if problems and not found:
        raise problems[0]
    return max(found, key=lambda c: c.counters["score"], default=None)


def best_score(root: Path) -> float:
    """Score of the best checkpoint so far; -inf where there is none that can be read."""
    try:
        found = best(root)
    except CheckpointError:
        return float("-inf")
    return float("-inf") if found is None else found.counters["score"]


def folders(root: Path) -> list[Path]:
    """Checkpoint folders, newest first (whether they are sound or not)."""
    return sorted((p for p in root.glob("step_*_u*") if p.is_dir()), key=lambda p: order(p.name), reverse=True) if root.is_dir() else []


def order(name: str) -> tuple[int, int, int]:
    """Checkpoint names by age: environment steps, updates, then how many of the same counters came before (the number behind the dot)."""
    found = NAME.fullmatch(name)
    steps, updates, again = found.groups(default="0") if found else ("-1", "-1", "0")
    return int(steps), int(updates), int(again)


def newest(root: Path, set_aside: bool = False) -> Checkpoint | None:
    """The newest sound checkpoint; damaged ones before it are named on stderr. None where there is no checkpoint at all.

    set_aside: rename the damaged ones, so that they do not count among those that are kept (only for who writes there).
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
        for damaged in found[:len(problems)] if set_aside else []:
            os.replace(damaged, damaged.with_name(f"damaged_{damaged.name}_{time.time_ns()}"))
        return checkpoint
    if found:
        raise CheckpointError(f"{root}: none of {len(found)} checkpoint(s) can be used ({'; '.join(problems)}); "
                              "restore one, or remove the folder to start again from zero")
    return None


def verified(folder: Path) -> Checkpoint:
    """A checkpoint whose files all have the sums that its marker says; CheckpointError names the first that has not."""
    try:
        marker = json.loads(text := (folder / DONE).read_text())
        counters = json.loads((folder / COUNTERS).read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder}: is not complete, {Path(error.filename).name!r} is missing") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: marker or counters cannot be read ({error})") from error
    if isinstance(marker, dict) and marker.get("format", FORMAT) != FORMAT:
        raise CheckpointError(f"{folder}: has format {marker['format']!r}, this program reads 1 and {FORMAT}; it was written by a newer version, use that one")
    if text != as_json(marker):                                                     # nothing sums the marker up: not even a blank may differ
        raise CheckpointError(f"{folder / DONE}: is not as it was written, the file is damaged")
    sums = marker.get("files") if isinstance(marker, dict) and "format" in marker else marker          # format 1: bare sums
    if not isinstance(sums, dict) or not isinstance(counters, dict) or COUNTERS not in sums:
        raise CheckpointError(f"{folder}: marker or counters are not what this program writes")
    for name, expected in sums.items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise CheckpointError(f"{path}: is missing")
        try:
            found = sha256(path)
        except OSError as error:                                                    # a bad sector, or a file system that is gone
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
        if found != expected:
            raise CheckpointError(f"{path}: its sha256 is not the one of the marker, the file is damaged")
    return Checkpoint(folder, counters)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_synced(path: Path, content: str | bytes) -> None:
    """To a file that appears complete or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    sync(partial)
    os.replace(partial, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """A file's contents, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
