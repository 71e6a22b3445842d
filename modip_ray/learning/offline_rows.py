"""Offline data as rows in a file, which every process that needs them maps read-only: they are in memory once, however many share them."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from modip_ray.config import ConfigError
from modip_ray.learning.replay import ReplayBuffer
from modip_ray.learning.segment import Segment
from modip_ray.tasks.episode import Episode

EXTRA = 4                           # columns of a row beside observation and action


def in_memory(episodes: Sequence[Episode], gamma: float, steps: np.ndarray | None = None) -> ReplayBuffer:
    """A full buffer of just these episodes; `steps`: as of ReplayBuffer."""
    obs_dim, action_dim = episodes[0].observations.shape[1], episodes[0].actions.shape[1]
    buffer = ReplayBuffer(sum(e.length for e in episodes), obs_dim, action_dim, gamma, steps=steps)
    for episode in episodes:
        buffer.add(Segment.from_episode(episode))
    return buffer


def write_rows(episodes: Sequence[Episode], gamma: float, shards: int, folder: Path) -> list[Path]:
    """A file for each replay shard, every shards-th episode in it. Files of before are replaced whole: a process may still map them."""
    if len(episodes) < shards:
        raise ConfigError(f"replay.shards: got {shards}, but the data have {len(episodes)} episode(s), and each shard needs one")
    folder.mkdir(exist_ok=True)
    paths = [folder / f"rows_{i}_of_{shards}.npy" for i in range(shards)]
    for i, path in enumerate(paths):
        own, partial = episodes[i::shards], path.with_name(f".{path.name}")
        ends = ends_of(partial)
        shape = sum(e.length for e in own), own[0].observations.shape[1] + own[0].actions.shape[1] + EXTRA
        try:
            steps = np.lib.format.open_memmap(partial, "w+", np.float32, shape)
            take_room(partial)
            buffer = in_memory(own, gamma, steps)
            steps.flush()
            with open(ends, "wb") as file:
                np.save(file, np.column_stack([buffer.end_obs, buffer.end_terminated]).astype(np.float32)[:len(own)])
        except OSError:
            partial.unlink(missing_ok=True)                                         # a full disk gets its room back
            ends.unlink(missing_ok=True)
            raise
        os.replace(ends, ends_of(path))
        os.replace(partial, path)
    return paths


def take_room(path: Path) -> None:
    """Have a file's bytes on the disk before they are written through memory, where a full disk would be a bus error. OSError where there is no room."""
    with open(path, "r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):                 # a file system that cannot say
                raise OSError(error.errno, error.strerror, str(path)) from error


def ends_of(path: Path) -> Path:
    return path.with_suffix(".ends.npy")


def mapped(path: Path, gamma: float) -> ReplayBuffer:
    """The buffer of `write_rows`, read-only. ConfigError where the file cannot be read from here."""
    try:
        steps, ends = np.load(path, mmap_mode="r"), np.load(ends_of(path))
    except (OSError, ValueError) as error:
        raise ConfigError(f"run_dir: {path} cannot be read ({error}); put run_dir on storage that all nodes share, or place the replay on the driver's node "
                          "(resources.placement.replay)") from error
    obs_dim = ends.shape[1] - 1
    buffer = ReplayBuffer(len(steps), obs_dim, steps.shape[1] - obs_dim - EXTRA, gamma, steps=steps.view(np.ndarray))
    buffer.size = buffer.total = len(steps)
    buffer.end_obs, buffer.end_terminated, buffer.free_ends = np.ascontiguousarray(ends[:, :-1]), ends[:, -1] > 0, []
    return buffer
