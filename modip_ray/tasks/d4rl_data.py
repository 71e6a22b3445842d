"""D4RL's HDF5 layout: observations, actions, rewards, terminals, timeouts and (mostly) next_observations, one row a transition."""
from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import h5py
import numpy as np

from modip_ray.tasks.dataset import DataError, Dataset, describe, statistics
from modip_ray.tasks.episode import Episode
from modip_ray.tasks.hdf5 import ACTION_TOLERANCE, dataset_of, key_names, opened, read_flags, read_numbers

__all__ = ["DataError", "Dataset", "describe", "read_d4rl", "read_policy", "statistics", "write_d4rl"]

BLOCK = 65_536  # rows compared at a time


def read_d4rl(path: str | Path, max_transitions: int | None = None, max_episode_steps: int | None = None,
              action_range: tuple[float, float] | None = (-1.0, 1.0), keep_success: bool = False) -> Dataset:
    """Episodes of a D4RL file, each with its true last observation; DataError names file, key, index and what was expected.

    max_transitions   : use only the first rows of the file; the episode they cut is kept, as not terminated
    max_episode_steps : only for files without `timeouts` (D4RL v0): an episode also ends after so many steps
    action_range      : what actions must lie in (D4RL's all lie in [-1, 1]); None accepts any
    keep_success      : for who ends episodes, terminated, at a reward of 1: an episode with one at its end counts as one that terminated below

    An episode ends at `terminals` OR `timeouts`; rows after the last end are a final episode that was cut. Its last observation is
    - `next_observations` at its last row, where the file has that key; a row inside an episode whose next_observations is not the
      following row's observation was the end of an unmarked (cut) episode, and is treated so;
    - without that key (kitchen): unknown. An episode that did not terminate loses its last transition, whose next observation would be made up.
      One that terminated keeps it, because its reward and its termination are known and no value is bootstrapped after it; its last
      observation repeats the one before.
    What was dropped, cut or filled in is said in `Dataset.notes`.
    """
    if max_transitions is not None and max_transitions < 1:
        raise ValueError(f"max_transitions is {max_transitions}; at least 1 is needed")
    path, notes = Path(path), []
    with opened(path) as file:
        rows = _rows(path, file)
        used = rows if max_transitions is None else min(rows, max_transitions)
        observations = read_numbers(path, file, "observations", min(rows, used + 1), 2)     # one more than used: it may be a cut episode's last one
        actions = read_numbers(path, file, "actions", used, 2)
        rewards = read_numbers(path, file, "rewards", used, 1)
        terminals = read_flags(path, file, "terminals", used)
        if "timeouts" in file:
            timeouts = read_flags(path, file, "timeouts", used)
        elif max_episode_steps is None:
            raise DataError(f"{path}: key 'timeouts' is missing (a D4RL v0 file?), so the end of an episode by its time limit cannot be seen; "
                            f"pass max_episode_steps to cut at (modip data: --max-episode-steps N). The file has {key_names(file)}")
        else:
            timeouts = _time_limits(terminals, max_episode_steps)
            if timeouts.any():
                notes.append(f"no timeouts: {int(timeouts.sum())} episode(s) taken to end at the time limit of {max_episode_steps} steps")
        following = read_numbers(path, file, "next_observations", used, 2) if "next_observations" in file else None
        metadata = _short_metadata(file)
    if following is not None and following.shape[1] != observations.shape[1]:
        raise DataError(f"{path}: 'next_observations' has {following.shape[1]} columns, expected {observations.shape[1]} like 'observations'")
    _check_actions(path, actions, action_range)
    ends = terminals | timeouts
    if following is not None:
        ends = ends | _unmarked_ends(path, observations, following, ends, notes)
    episodes = _split(observations, actions, rewards, terminals, ends, following, notes, keep_success)
    if not episodes:
        raise DataError(f"{path}: holds no complete transition ({used} rows used); " + "; ".join(notes))
    return Dataset(episodes, str(path), metadata, tuple(notes))


def write_d4rl(path: str | Path, episodes: Sequence[Episode], metadata: Mapping) -> None:
    """Write D4RL's layout, next_observations included, so that read_d4rl returns the same episodes; `path` appears complete or not at all.

    metadata: nested mapping of text, numbers and arrays, stored under `metadata/` (a behaviour policy under "policy": see read_policy).
    An episode that did not terminate is marked as timed out.
    """
    if len(episodes) == 0:
        raise DataError(f"{path}: there is no episode to write")
    for i, episode in enumerate(episodes):
        episode.validate(f"episode {i}")
        for key in ("observations", "actions"):
            got, expected = getattr(episode, key).shape[1], getattr(episodes[0], key).shape[1]
            if got != expected:
                raise DataError(f"{path}: episode {i} has {got} columns of {key}, expected {expected} as in episode 0")
    last = np.cumsum([e.length for e in episodes]) - 1
    flags = np.zeros((2, last[-1] + 1), bool)
    for row, episode in zip(last, episodes, strict=True):
        flags[0 if episode.terminated else 1, row] = True
    arrays = {
        "observations": np.concatenate([e.observations[:-1] for e in episodes]), "next_observations": np.concatenate([e.observations[1:] for e in episodes]),
        "actions": np.concatenate([e.actions for e in episodes]), "rewards": np.concatenate([e.rewards for e in episodes]),
        "terminals": flags[0], "timeouts": flags[1],
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with h5py.File(temporary, "w", libver="v110") as file:                      # HDF5's checksums: over its own structure since v110,
            for key, value in arrays.items():
                file.create_dataset(key, data=value, fletcher32=True)               # and over the data
            _write_tree(path, file.create_group("metadata"), metadata)
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_policy(path: str | Path) -> dict[str, np.ndarray | str | float]:
    """The behaviour policy under `metadata/policy`, flat: {"fc0.weight": (out, in), ..., "nonlinearity": "relu"}."""
    path = Path(path)
    with opened(path) as file:
        group = file.get("metadata/policy")
        if not isinstance(group, h5py.Group):
            raise DataError(f"{path}: key 'metadata/policy' is missing, so the file names no behaviour policy; it has {key_names(file)}")
        found: dict[str, np.ndarray | str | float] = {}

        def keep(name: str, item: h5py.Dataset | h5py.Group) -> None:
            if isinstance(item, h5py.Dataset):
                found[name.replace("/", ".")] = _plain(item)
        group.visititems(keep)
    return found


# ---- reading ---------------------------------------------------------------------------------------------------------------------------------

def _rows(path: Path, file: h5py.File) -> int:
    """Number of transitions; DataError when the keys differ in length."""
    rows = len(dataset_of(path, file, "observations", 2))
    for key, dims in (("actions", 2), ("rewards", 1), ("terminals", 1), ("timeouts", 1), ("next_observations", 2)):
        if key in file or key in ("actions", "rewards", "terminals"):
            got = len(dataset_of(path, file, key, dims))
            if got != rows:
                raise DataError(f"{path}: key '{key}' has {got} rows, expected {rows} like 'observations'")
    return rows


def _check_actions(path: Path, actions: np.ndarray, action_range: tuple[float, float] | None) -> None:
    if action_range is None:
        return
    low, high = action_range
    wrong = np.argwhere((actions < low - ACTION_TOLERANCE) | (actions > high + ACTION_TOLERANCE))
    if len(wrong):
        row, column = wrong[0].tolist()
        raise DataError(f"{path}: actions[{row}, {column}] is {actions[row, column]:g}; expected actions in [{low:g}, {high:g}], "
                        f"those of the task's environment, and {len(wrong)} values lie outside; are these data of another one (task.env)?")


def _time_limits(terminals: np.ndarray, max_episode_steps: int) -> np.ndarray:
    """Flags (T,) where an episode without a terminal reached `max_episode_steps`."""
    timeouts, begin = np.zeros(len(terminals), bool), 0
    for end in [*np.flatnonzero(terminals).tolist(), len(terminals)]:
        timeouts[begin + max_episode_steps - 1:end:max_episode_steps] = True
        begin = end + 1
    return timeouts


def _unmarked_ends(path: Path, observations: np.ndarray, following: np.ndarray, ends: np.ndarray, notes: list[str]) -> np.ndarray:
    """Flags (T,) where next_observations[t] is not observations[t+1] although no end is marked: replay buffers hold such cuts."""
    joined = len(observations) - 1                                                  # rows whose successor is in the file
    gap = np.zeros(len(ends), bool)
    for begin in range(0, joined, BLOCK):                                            # in blocks: isclose takes several times its arguments' memory
        block = slice(begin, min(begin + BLOCK, joined))
        gap[block] = ~np.isclose(following[block], observations[1:][block], rtol=1e-4, atol=1e-5).all(1) & ~ends[block]
    rows = np.flatnonzero(gap)
    if len(rows) > int(ends.sum()) + 1:
        raise DataError(f"{path}: next_observations[{rows[0]}] is not the observation of the next row although its episode goes on, "
                        f"and so at {len(rows)} rows; expected the rows of an episode in time order")
    if len(rows):
        notes.append(f"{len(rows)} episode(s) end without a mark (next_observations is not the next row's observation, first at row {rows[0]}): kept as cut")
    return gap


def _split(observations: np.ndarray, actions: np.ndarray, rewards: np.ndarray, terminals: np.ndarray, ends: np.ndarray, following: np.ndarray | None,
           notes: list[str], keep_success: bool) -> list[Episode]:
    """Cut the rows into episodes; see read_d4rl for the last observations."""
    used = len(rewards)
    stops = (np.flatnonzero(ends) + 1).tolist()
    if not stops or stops[-1] < used:
        stops.append(used)
        notes.append("the last episode is cut at the end of the rows used")
    episodes, begin, dropped, repeated = [], 0, 0, 0
    for stop in stops:
        terminated, length = bool(terminals[stop - 1]), stop - begin
        if following is not None:
            last = following[stop - 1:stop]
        elif not ends[stop - 1] and stop < len(observations):                       # cut by max_transitions: the next row belongs to the same episode
            last = observations[stop:stop + 1]
        elif terminated or (keep_success and rewards[stop - 1] >= 1):
            last, repeated = observations[stop - 1:stop], repeated + 1
        else:
            last, length, dropped = observations[:0], length - 1, dropped + 1
        if length:
            rows = slice(begin, begin + length)
            episodes.append(Episode(np.concatenate([observations[begin:stop], last]), actions[rows].copy(), rewards[rows].copy(), terminated))
        begin = stop
    if dropped:
        notes.append(f"no next_observations: {dropped} last transition(s) of episodes that did not terminate dropped, their next observation is unknown")
    if repeated:
        notes.append(f"no next_observations: the last observation of {repeated} terminated{' or solved' * keep_success} episode(s) repeats the one before")
    return episodes


# ---- metadata --------------------------------------------------------------------------------------------------------------------------------

def _plain(item: h5py.Dataset) -> np.ndarray | str | float:
    value = item[()]
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return value.item() if np.ndim(value) == 0 and hasattr(value, "item") else value


def _short_metadata(file: h5py.File) -> dict:
    """The scalars directly under `metadata/`."""
    group = file.get("metadata")
    items = group.items() if isinstance(group, h5py.Group) else ()
    return {key: _plain(item) for key, item in items if isinstance(item, h5py.Dataset) and item.shape == ()}


def _write_tree(path: Path, group: h5py.Group, tree: Mapping) -> None:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            _write_tree(path, group.create_group(key), value)
            continue
        if isinstance(value, str):                                                  # of fixed size, as D4RL has it: HDF5 can hang on damaged variable-size text
            text = value.encode()
            value = np.array(text, dtype=f"S{max(1, len(text))}")
        try:
            group.create_dataset(key, data=value, fletcher32=np.ndim(value) > 0)
        except TypeError as error:
            raise DataError(f"{path}: {group.name}/{key} is {value!r}; metadata may hold text, numbers, arrays and mappings of them") from error
