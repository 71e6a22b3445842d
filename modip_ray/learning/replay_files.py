"""The online ring in checkpoint folders: chunks of transitions, each a component of its own, of which a new checkpoint writes only what is new.

Chunk i holds the transitions i * CHUNK .. (i+1) * CHUNK - 1 as far as they were in the ring. One that is full never changes, so a checkpoint takes over
the file of the checkpoint *before the last*, as a hard link where the disk knows them. The last checkpoint and the new one therefore share no file:
every transition is written twice, and one damaged file spoils at most one of the two.
"""

from __future__ import annotations

import os
import shutil
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from modip_ray.learning.checkpoint import Checkpoint, CheckpointError, folders, write_state
from modip_ray.learning.replay import Batch, ReplayBuffer

CHUNK = 65536


class Snapshot(NamedTuple):
    """What a checkpoint is to hold of the ring, copied at one moment."""

    links: list[Path]
    written: dict[int, Batch]           # by chunk
    full: int                           # chunks before this one are full


class ReplayFiles:
    def __init__(self, component: str):
        self.component = component
        self.sums: dict[str, int] = {}  # crc32 of the files of full chunks, as this replay wrote or loaded them

    def name(self, chunk: int) -> str:
        return f"{self.component}.rows_{chunk:07d}"

    def file(self, folder: Path, name: str) -> Path | None:
        return next(iter(folder.glob(f"{name}.*")), None)

    def sound(self, root: Path) -> dict[str, Path]:
        """Files of the checkpoint before the last that hold what is in the ring, by name. Reads them: may be called beside the rest."""
        found = {}
        for folder in folders(root)[1:2]:
            for name, expected in self.sums.items():
                path = self.file(folder, name)
                if path is not None and crc32(path) == expected:
                    found[name] = path
        return found

    def snapshot(self, ring: ReplayBuffer, sound: dict[str, Path]) -> Snapshot:
        oldest, full = ring.total - ring.size, ring.total // CHUNK
        chunks = range(oldest // CHUNK, -(-ring.total // CHUNK))
        linked = {i: sound[self.name(i)] for i in chunks if i < full and self.name(i) in sound}
        spans = {i: (max(oldest, i * CHUNK), min(ring.total, (i + 1) * CHUNK)) for i in chunks if i not in linked}
        return Snapshot(list(linked.values()), {i: ring.rows(*span) | {"first": np.array([span[0]])} for i, span in spans.items()}, full)

    def write(self, folder: Path, snapshot: Snapshot) -> dict[str, int]:
        """Links and new files into a checkpoint's folder; returns the sums of full chunks. May be called beside the rest."""
        for path in snapshot.links:
            (folder / path.name).unlink(missing_ok=True)        # of a call before, which a restart cut short
            try:
                os.link(path, folder / path.name)
            except OSError:                                     # a file system without links
                shutil.copyfile(path, folder / path.name)
        new = {}
        for i, rows in snapshot.written.items():
            write_state(folder, self.name(i), rows)
            if i < snapshot.full:
                new[self.name(i)] = crc32(self.file(folder, self.name(i)))
        kept = {path.name.rpartition(".")[0] for path in snapshot.links}
        self.sums = {name: s for name, s in self.sums.items() if name in kept} | new
        return self.sums

    def load(self, ring: ReplayBuffer, checkpoint: Checkpoint, size: int, total: int, sums: dict[str, int]) -> None:
        """Fill an empty ring with the newest `size` of `total` transitions. CheckpointError names what does not fit."""
        self.sums, ring.total = dict(sums), total - size
        while ring.total < total:
            name = self.name(ring.total // CHUNK)
            try:
                rows = checkpoint.read(name)
                ring.extend(without(rows, ring.total - int(rows.pop("first")[0])))
            except (ValueError, KeyError) as error:
                raise CheckpointError(f"{checkpoint.path}: {name} cannot be used: {error}") from error
        if (ring.size, ring.total, ring.open_end) != (size, total, None):
            raise CheckpointError(f"{checkpoint.path}: {self.component} holds {ring.size} transitions up to number {ring.total}, expected {size} up to {total}")


def without(rows: Batch, n: int) -> Batch:
    """`ReplayBuffer.rows` less the first n transitions. ValueError where there are not so many."""
    if not 0 <= n < len(rows["steps"]):
        raise ValueError(f"transitions from {n} on are asked for, of {len(rows['steps'])}")
    remaining = rows["steps"].view(np.int32)[:, -2]
    return {k: v[int((remaining[:n] == 1).sum()) if k == "end_obs" else n:] for k, v in rows.items()}


def crc32(path: Path) -> int:
    with open(path, "rb") as file:
        crc = 0
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc
