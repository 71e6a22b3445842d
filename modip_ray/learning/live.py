"""What a running process keeps in the run's folder beside the checkpoints: the newest state of roles that may have to begin again. Plain files, no Ray.

A folder for each process of the run, so that what an earlier one left behind, or still writes, is never taken for this one's.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from modip_ray.learning.checkpoint import Checkpoint, State, newest, read_state, write_state

LIVE = "live"


def open_live(run: Path, process: str) -> Path:
    """The folder of this process of the run; those of earlier ones go."""
    shutil.rmtree(run / LIVE, ignore_errors=True)
    folder = run / LIVE / process
    folder.mkdir(parents=True)
    return folder


def write_snapshot(folder: Path, component: str, state: Mapping[str, np.ndarray]) -> None:
    """Replace a component's snapshot: it is the old or the new one at any moment."""
    partial = folder / f".{component}"
    partial.mkdir(exist_ok=True)
    write_state(partial, component, state)
    for file in partial.iterdir():
        os.replace(file, folder / file.name)


def read_snapshot(folder: Path, component: str) -> State | None:
    """The newest snapshot, None where there is none yet."""
    found = next(folder.glob(f"{component}.*"), None)
    return read_state(found) if found is not None else None


def newest_state(component: str, count: str, live: Path | None, checkpoint: Checkpoint | None) -> tuple[State | None, str]:
    """A component's state with the highest state[count], and where it is from in words: its snapshot, or the newest checkpoint of the run.

    live: folder of `open_live`; where there is none, the given checkpoint counts.
    """
    found: list[tuple[State, str]] = []
    if live is not None:
        checkpoint = newest(live.parent.parent / "checkpoints")
        snapshot = read_snapshot(live, component)
        if snapshot is not None:
            found.append((snapshot, "its snapshot"))
    if checkpoint is not None:
        found.append((checkpoint.read(component), f"checkpoint {checkpoint.path.name}"))
    return max(found, key=lambda item: int(item[0][count]), default=(None, "the start"))
