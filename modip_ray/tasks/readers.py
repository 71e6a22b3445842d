"""One reader for every source of offline data: files by their layout, Minari datasets, and the catalogue's names."""
from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np

from modip_ray.tasks.catalogue import Progress, catalogue, fetch, not_found
from modip_ray.tasks.d4rl_data import read_d4rl
from modip_ray.tasks.dataset import DataError, Dataset
from modip_ray.tasks.hdf5 import ACTION_TOLERANCE, DAMAGE

MINARI = "minari:"
SUFFIXES = (".hdf5", ".h5")


def read_any(source: str | Path, *, max_transitions: int | None = None, max_episode_steps: int | None = None,
             action_range: tuple[float, float] | None = None, filter_key: str | None = None, keep_success: bool = False,
             progress: Progress | None = None) -> Dataset:
    """Episodes of `source`: the path of a D4RL or robomimic file (told apart by their keys), "minari:<id>", or a name of the catalogue.

    max_transitions   : use only the first ones; the episode they cut is kept, as not terminated
    max_episode_steps : for D4RL v0 files, which do not mark time limits
    action_range      : what actions must lie in; None accepts any
    filter_key        : for robomimic files, which demonstrations (a name under `mask/`)
    keep_success      : where a file has no next observations, keep a last transition that earns 1, with its observation repeated (for data.rewards:
                        until_success, which ends the episode there)
    progress          : called with (bytes there, bytes in all) while a catalogue file is downloaded, which happens once
    """
    text = str(source)
    if text.startswith(MINARI):
        from modip_ray.tasks.minari_data import read_minari
        _no_filter(text, filter_key, "a Minari dataset")
        return _in_range(read_minari(text.removeprefix(MINARI), max_transitions, download=True), action_range)
    path = source_path(source, progress)
    if layout(path) == "robomimic":
        from modip_ray.tasks.robomimic_data import read_robomimic
        return _in_range(read_robomimic(path, filter_key=filter_key, max_transitions=max_transitions, keep_success=keep_success), action_range)
    _no_filter(str(path), filter_key, "D4RL's layout")
    return read_d4rl(path, max_transitions, max_episode_steps, action_range, keep_success)


def source_path(source: str | Path, progress: Progress | None = None) -> Path:
    """The file that a path or a catalogue name stands for, downloaded if need be; DataError where it is neither."""
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir() if p.suffix in SUFFIXES)
        raise DataError(f"{source}: is a folder; expected a file{f', e.g. {path / inside[0]}' if inside else ''}")
    if str(source) in catalogue():
        return fetch(str(source), progress)
    if path.is_absolute() or path.suffix in SUFFIXES or str(source).startswith(("./", "../", "~")):
        raise DataError(f"{source}: no such file (data.source is a file, a name of 'modip data list', minari:<id>, or demonstrator)")
    raise DataError(f"{source!r} is no file, and {not_found(str(source))}; a Minari dataset is named minari:<id>")


def layout(path: Path) -> str:
    """ "d4rl" or "robomimic", by the file's keys; DataError where they are neither's."""
    try:
        with h5py.File(path, "r") as file:
            names = sorted(str(name) for name in file)
    except DAMAGE as error:
        raise DataError(f"{path}: cannot be read as HDF5 ({error}); {path.stat().st_size:,} bytes: is it damaged, was the download cut short?") from error
    if "data" in names and "observations" not in names:
        return "robomimic"
    if {"observations", "actions", "rewards", "terminals"} & set(names):
        return "d4rl"
    raise DataError(f"{path}: is laid out neither as D4RL has it (observations, actions, rewards, terminals) nor as robomimic has it (data/demo_...); "
                    f"it has {', '.join(names) or 'no keys'}")


def _no_filter(name: str, filter_key: str | None, what: str) -> None:
    if filter_key is not None:
        raise DataError(f"{name}: filter_key is {filter_key!r}, but only robomimic files have such keys, and this is {what}; leave it out")


def _in_range(dataset: Dataset, action_range: tuple[float, float] | None) -> Dataset:
    if action_range is not None:
        low, high = action_range
        for i, episode in enumerate(dataset.episodes):
            wrong = np.argwhere((episode.actions < low - ACTION_TOLERANCE) | (episode.actions > high + ACTION_TOLERANCE))
            if len(wrong):
                row, column = wrong[0].tolist()
                raise DataError(f"{dataset.source}: episode {i}: actions[{row}, {column}] is {episode.actions[row, column]:g}; "
                                f"expected actions in [{low:g}, {high:g}], those of the task's environment; are these data of another one (task.env)?")
    return dataset
