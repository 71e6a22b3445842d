"""Minari datasets (https://minari.farama.org) as episodes, and episodes as a Minari dataset. Needs the package minari with its hdf5 extra."""
from __future__ import annotations

import difflib
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium as gym
import numpy as np

from modip_ray.tasks.dataset import DataError, Dataset
from modip_ray.tasks.episode import Episode

DAMAGE = (OSError, RuntimeError, KeyError, ValueError, TypeError, IndexError, AttributeError, AssertionError, OverflowError, MemoryError,
          NotImplementedError, ImportError, gym.error.Error)                        # what minari raises on a damaged, newer or unusual dataset
TOLD = ("algorithm_name", "author", "code_permalink", "description")                # kept from the dataset's own description


def read_minari(dataset_id: str, max_transitions: int | None = None, download: bool = False) -> Dataset:
    """Episodes of a Minari dataset that is here (in $MINARI_DATASETS_PATH, else ~/.minari/datasets), or, with `download`, on Minari's server.

    max_transitions : use only the first transitions; the episode they cut is kept, as not terminated

    Observations must be numbers: a Dict (or Tuple) of boxes becomes one vector, keys in alphabetical order at every level, as
    gymnasium.wrappers.FlattenObservation does with a space read back from Minari. `terminated` is what `terminations` says at the last step;
    an episode that ends otherwise (`truncations`, or no mark at all, which is noted) did not terminate.
    """
    if max_transitions is not None and max_transitions < 1:
        raise ValueError(f"max_transitions is {max_transitions}; at least 1 is needed")
    minari = _minari()
    name = f"minari:{dataset_id}"
    if not _is_local(minari, dataset_id):
        if not download:
            raise DataError(f"{name}: {_absent(minari, dataset_id)}")
        _download(minari, dataset_id)
    with _told(name, "cannot be read; is it damaged, or made by a newer minari?"):
        data = minari.load_dataset(dataset_id)
        if not isinstance(data.action_space, gym.spaces.Box) or len(data.action_space.shape) != 1:
            raise DataError(f"{name}: its action space is {data.action_space}; expected a Box with one dimension")
        _check_space(name, "observations", data.observation_space)
        episodes, left, unmarked = [], max_transitions, 0
        for stored in data.iterate_episodes():
            episode, marked = _episode(f"{name}, episode {stored.id}", stored, data.observation_space)
            unmarked += not marked
            if left is not None and episode.length > left:
                episode = Episode(episode.observations[:left + 1], episode.actions[:left], episode.rewards[:left], False)
            episodes.append(episode)
            left = left if left is None else left - episode.length
            if left == 0:
                break
        metadata = _metadata(dataset_id, data)
    if not episodes:
        raise DataError(f"{name}: holds no episode")
    for key in ("observations", "actions"):
        widths = sorted({getattr(e, key).shape[1] for e in episodes})
        if len(widths) > 1:
            raise DataError(f"{name}: {key} have {' or '.join(map(str, widths))} columns; expected the same number in every episode")
    notes = [f"{unmarked} episode(s) end neither terminated nor truncated: kept as cut"] if unmarked else []
    return Dataset(episodes, name, metadata, tuple(notes))


def write_minari(dataset_id: str, episodes: Sequence[Episode], env_id: str | None = None, description: str = "", algorithm: str = "") -> None:
    """Make a local Minari dataset of the episodes, whole or not at all; read_minari returns the same ones.

    env_id: the registered gymnasium environment that they come from, which Minari records and can make again; its action space must fit.
    DataError where the dataset exists already, its id is malformed (expected NAMESPACE/NAME-vN), or episodes are unsound.
    """
    minari, name = _minari(), f"minari:{dataset_id}"
    if len(episodes) == 0:
        raise DataError(f"{name}: there is no episode to write")
    obs_dim, action_dim = (getattr(episodes[0], key).shape[1] for key in ("observations", "actions"))
    for i, episode in enumerate(episodes):
        episode.validate(f"episode {i}")
        if (episode.observations.shape[1], episode.actions.shape[1]) != (obs_dim, action_dim):
            raise DataError(f"{name}: episode {i} has {episode.observations.shape[1]} columns of observations and {episode.actions.shape[1]} of actions, "
                            f"expected {obs_dim} and {action_dim} as in episode 0")
    if _is_local(minari, dataset_id):
        raise DataError(f"{name}: exists already, and Minari does not overwrite; choose another name or version, or 'minari delete {dataset_id}'")
    spec, actions = None, gym.spaces.Box(-np.inf, np.inf, (action_dim,), np.float32)
    with _told(name, "cannot be written"), _quiet():
        if env_id is not None:
            spec, actions = _env(name, env_id, action_dim)
        folder = _folder(minari, dataset_id)
        if folder.exists():
            raise DataError(f"{name}: {folder} exists and is no Minari dataset; move it away")
        try:
            minari.create_dataset_from_buffers(
                dataset_id, [_buffer(k, e) for k, e in enumerate(episodes)], env=spec, algorithm_name=algorithm or None, description=description or None,
                observation_space=gym.spaces.Box(-np.inf, np.inf, (obs_dim,), np.float32), action_space=actions)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


# ---- minari itself ---------------------------------------------------------------------------------------------------------------------------

def _minari() -> ModuleType:
    try:
        import h5py  # noqa: F401  (minari's hdf5 extra)
        import minari
    except ImportError as error:
        raise DataError(f"Minari datasets need the package minari ({error}); pip install 'minari[hdf5]'") from error
    return minari


@contextmanager
def _told(name: str, what: str) -> Iterator[None]:
    """Whatever minari raises becomes a DataError."""
    try:
        yield
    except DataError:
        raise
    except DAMAGE as error:
        raise DataError(f"{name}: {what} ({type(error).__name__}: {error})") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without minari's advice on descriptions, and gymnasium's on versions of environments (D4RL's data needs the -v4 ids)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        yield


def _folder(minari: ModuleType, dataset_id: str) -> Path:
    """Folder of a dataset; DataError for a malformed id."""
    try:
        minari.dataset.minari_dataset.parse_dataset_id(dataset_id)
    except (ValueError, TypeError) as error:
        raise DataError(f"minari:{dataset_id}: is no Minari id; expected NAMESPACE/NAME-vN, e.g. mujoco/hopper/medium-v0") from error
    return minari.storage.get_dataset_path(dataset_id)


def _is_local(minari: ModuleType, dataset_id: str) -> bool:
    return (_folder(minari, dataset_id) / "data").is_dir()


def _absent(minari: ModuleType, dataset_id: str) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                                             # about other datasets in the folder
        here = list(minari.list_local_datasets())
    close = difflib.get_close_matches(dataset_id, here, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(here[:5])}" if here else ", which holds no dataset"
    return f"is not in {minari.storage.get_dataset_path()} (MINARI_DATASETS_PATH sets another folder){hint}"


def _download(minari: ModuleType, dataset_id: str) -> None:
    """From Minari's server; DataError says what was missing. What came of an unfinished download is removed: minari would take it for the dataset."""
    folder = _folder(minari, dataset_id)
    try:
        with _quiet():
            minari.download_dataset(dataset_id)
    except BaseException as error:
        if not _is_sound(minari, dataset_id):
            shutil.rmtree(folder, ignore_errors=True)
        if not isinstance(error, Exception):
            raise
        if isinstance(error, ImportError):
            raise DataError(f"minari:{dataset_id}: downloads need a package that is missing ({error})") from error
        raise DataError(f"minari:{dataset_id}: cannot be downloaded ({type(error).__name__}: {error}). Where there is no network, run 'minari download "
                        f"{dataset_id}' on another machine and copy the folder to {folder}. Here it {_absent(minari, dataset_id)}") from error


def _is_sound(minari: ModuleType, dataset_id: str) -> bool:
    try:
        minari.load_dataset(dataset_id)
    except DAMAGE:
        return False
    return True


def _env(name: str, env_id: str, action_dim: int) -> tuple[gym.envs.registration.EnvSpec | None, gym.spaces.Box]:
    """Spec and action space of the environment that the actions are for."""
    try:
        env = gym.make(env_id)
    except gym.error.Error as error:
        raise DataError(f"{name}: environment {env_id!r} cannot be made ({error})") from error
    spec, space = env.spec, env.action_space
    env.close()
    if not isinstance(space, gym.spaces.Box) or space.shape != (action_dim,):
        raise DataError(f"{name}: the episodes' actions have {action_dim} columns, but the action space of {env_id} is {space}")
    return spec, space


# ---- episodes --------------------------------------------------------------------------------------------------------------------------------

def _check_space(name: str, what: str, space: gym.Space) -> None:
    """DataError unless the space is a Box, or a Dict or Tuple of such."""
    for key, part in _parts(space):
        _check_space(name, f"{what}/{key}", part)
    if not isinstance(space, gym.spaces.Box | gym.spaces.Dict | gym.spaces.Tuple):
        raise DataError(f"{name}: {what} are {space}; expected a Box of numbers, or a Dict of such")
    if isinstance(space, gym.spaces.Box) and space.dtype == np.uint8 and len(space.shape) > 1:
        raise DataError(f"{name}: {what} are images ({space}); only vectors of numbers can be used")


def _parts(space: gym.Space) -> list[tuple[str | int, gym.Space]]:
    if isinstance(space, gym.spaces.Dict):
        return list(space.spaces.items())
    return list(enumerate(space.spaces)) if isinstance(space, gym.spaces.Tuple) else []


def _flat(name: str, value: Any, space: gym.Space, rows: int) -> np.ndarray:
    """(rows, width) of a stored value; parts in the order of the space."""
    parts = _parts(space)
    if parts:
        return np.concatenate([_flat(f"{name}/{key}", value[key], part, rows) for key, part in parts], axis=1)
    array, shape = np.asarray(value), (rows, *(space.shape or ()))
    if array.shape != shape:
        raise DataError(f"{name} has shape {array.shape}, expected {shape}")
    with np.errstate(over="ignore"):                                                # a float64 beyond float32 becomes inf, and validate names it
        return array.reshape(rows, -1).astype(np.float32)


def _episode(name: str, stored: Any, space: gym.Space) -> tuple[Episode, bool]:
    """The episode, and whether its end is marked."""
    steps = len(stored.rewards)
    flags = []
    for key in ("terminations", "truncations"):
        value = np.asarray(getattr(stored, key))
        if value.shape != (steps,):
            raise DataError(f"{name}: {key} has shape {value.shape}, expected {(steps,)}, one for each reward")
        early = np.flatnonzero(value[:-1])
        if len(early):
            raise DataError(f"{name}: {key}[{early[0]}] is set, but the episode goes on to step {steps}; expected it at the last step only")
        flags.append(bool(value[-1]) if steps else False)
    observations = _flat(f"{name}: observations", stored.observations, space, steps + 1)
    actions = np.asarray(stored.actions, np.float32)
    episode = Episode(observations, actions, np.asarray(stored.rewards, np.float32).reshape(-1), flags[0])
    try:
        return episode.validate(name), any(flags)
    except ValueError as error:
        raise DataError(str(error)) from error


def _buffer(number: int, episode: Episode) -> object:
    from minari.data_collector import EpisodeBuffer
    terminations, truncations = np.zeros((2, episode.length), bool)
    (terminations if episode.terminated else truncations)[-1] = True
    return EpisodeBuffer(id=number, observations=episode.observations, actions=episode.actions, rewards=episode.rewards, terminations=terminations,
                         truncations=truncations)


def _metadata(dataset_id: str, data: Any) -> dict:
    """What the dataset says about itself, as short text."""
    own = data.storage.metadata
    told = {key: ", ".join(sorted(own[key])) if isinstance(own[key], set) else str(own[key]) for key in TOLD if own.get(key)}
    env = {"env": data.env_spec.id} if data.env_spec is not None else {}
    return {"minari_id": dataset_id, "minari_version": data.minari_version, **env, **told}
