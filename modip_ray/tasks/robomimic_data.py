"""robomimic's HDF5 layout (v0.1, v1.4, v1.5): data/demo_<i>/{obs, next_obs, actions, rewards}, one row a transition, and lists of demonstrations in mask/."""
from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np

from modip_ray.tasks.dataset import DataError, Dataset
from modip_ray.tasks.episode import Episode
from modip_ray.tasks.hdf5 import ACTION_TOLERANCE, dataset_of, key_names, opened, read_numbers

ROBOT_KEYS = ("eef_pos", "eef_quat", "gripper_qpos")
SIZES = {"eef_pos": 3, "eef_quat": 4, "gripper_qpos": 2}
End = Literal["known", "dropped", "repeated"]
DEMO = re.compile(r"demo_(\d+)")
TEXT_SECONDS = 60       # for a process that starts, opens a file and reads a text
SAME = 0.02             # metres that the stored relative positions may be off (median): robosuite 1.5 computes some from the step before
READ_TEXT = """
import json, sys
import h5py
path, key, attribute = sys.argv[1:]
with h5py.File(path, "r") as file:
    value = file[key].attrs[attribute] if attribute else file[key][()].tolist()
told = [v.decode(errors="replace") if isinstance(v, bytes) else v for v in (value if isinstance(value, list) else [value])]
print(json.dumps(told))
"""


@dataclass(frozen=True)
class Layout:
    """The columns of a task's `object` vector.

    absolute : (name, columns) of what is measured in the world
    stored   : the order of all its columns in files of robosuite before 1.5, which this project uses
    stored15 : their order in files of robosuite 1.5
    """

    robots: int
    absolute: tuple[tuple[str, int], ...]
    stored: tuple[tuple[str, int], ...]
    stored15: tuple[tuple[str, int], ...]


def _one_object(name: str) -> Layout:
    absolute = ((f"{name}_pos", 3), (f"{name}_quat", 4))
    relative = ((f"{name}_to_robot0_eef_pos", 3), (f"{name}_to_robot0_eef_quat", 4))
    return Layout(1, absolute, absolute + relative, relative + absolute)


_CUBE = (("cube_pos", 3), ("cube_quat", 4))
_PLACES = (("payload_pos", 3), ("payload_quat", 4), ("trash_pos", 3), ("trash_quat", 4), ("lid_handle_pos", 3), ("lid_handle_quat", 4),
           ("target_bin_pos", 3), ("trash_bin_pos", 3))
_REACHES = (("gripper0_to_payload", 3), ("gripper0_to_lid_handle", 3), ("gripper1_to_payload", 3), ("gripper1_to_trash", 3))
_DONE = (("payload_in_target_bin", 1), ("trash_in_trash_bin", 1))
LAYOUTS = {
    "Lift": Layout(1, _CUBE, (*_CUBE, ("cube_to_gripper", 3)), (*_CUBE, ("gripper_to_cube_pos", 3))),
    "PickPlaceCan": _one_object("Can"),
    "NutAssemblySquare": _one_object("SquareNut"),
    "TwoArmTransport": Layout(2, _PLACES + _DONE, _PLACES + _REACHES + _DONE, _PLACES + _DONE + _REACHES),
}


def object_vector(task: str, absolute: Mapping[str, np.ndarray], robots: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """The `object` vector (..., n) in the order of robosuite before 1.5.

    absolute : {name: (..., columns)} as LAYOUTS[task].absolute lists them; robots: for each (eef_pos (..., 3), eef_quat (..., 4) xyzw, ...)

    robosuite 1.5 has the same numbers in another order (Can, Square, Transport), with another sign (Lift), and, where the object comes after what is
    relative to it (Can, Square), relative to where the object was at the step before.
    """
    parts = {**absolute, **_relative(task, absolute, robots)}
    return np.concatenate([parts[key] for key, _ in LAYOUTS[task].stored], axis=-1)


def read_robomimic(path: str | Path, filter_key: str | None = None, max_transitions: int | None = None, obs_keys: Sequence[str] | None = None,
                   keep_success: bool = False) -> Dataset:
    """Demonstrations of a robomimic file, in the order of their numbers; DataError names file, key, index and what was expected.

    filter_key      : only the demonstrations listed under mask/<filter_key>, e.g. "train"
    max_transitions : use only the first ones; the episode they cut is kept
    obs_keys        : which of obs/ make up an observation; None for `object` and each robot's eef_pos, eef_quat, gripper_qpos
    keep_success    : for who ends episodes at their success, after which no value is bootstrapped: see below

    The last observation of an episode is next_obs at its last row (which robomimic's extraction took from robosuite's step, up to 50 ms old, and not from a
    recorded state as all others). In a file without next_obs it is unknown, and each episode loses its last transition; with keep_success one whose
    last reward is 1 keeps it, as its success may be at no other row, and its last observation repeats the one before. No episode terminates: success does
    not end them.
    Without obs_keys the object's columns come as robosuite before 1.5 has them, whatever the file's version: see object_vector.
    """
    if max_transitions is not None and max_transitions < 1:
        raise ValueError(f"max_transitions is {max_transitions}; at least 1 is needed")
    path = Path(path)
    notes: list[str] = []
    with opened(path) as file:
        demos = _demos(path, file, filter_key)
        keys = list(obs_keys) if obs_keys is not None else _usual_keys(path, file, demos[0])
        episodes, left, ends = [], max_transitions, []
        for demo in demos:
            episode, end = _episode(path, file, demo, keys, left, keep_success)
            ends.append(end)
            if episode is None:
                continue
            if episodes and episode.observations.shape[1] != episodes[0].observations.shape[1]:
                raise DataError(f"{path}: {demo} has observations of {episode.observations.shape[1]} columns, expected {episodes[0].observations.shape[1]} "
                                f"as before ({', '.join(keys)})")
            if episodes and episode.actions.shape[1] != episodes[0].actions.shape[1]:
                raise DataError(f"{path}: {demo}/actions has {episode.actions.shape[1]} columns, expected {episodes[0].actions.shape[1]} as before")
            episodes.append(episode)
            if left is not None and (left := left - episode.length) <= 0:
                break
        meta = _env_args(path, file)
    if not episodes:
        raise DataError(f"{path}: holds no complete transition: its episodes have one step each, and there is no next_obs")
    if "dropped" in ends:
        notes.append(f"no next_obs: {ends.count('dropped')} last transition(s) dropped, their next observation is unknown")
    if "repeated" in ends:
        notes.append(f"no next_obs: the last observation of {ends.count('repeated')} episode(s) that end in success repeats the one before")
    if obs_keys is None and meta["env_name"] in LAYOUTS:
        episodes = _in_our_order(path, meta["env_name"], episodes, notes)
    return Dataset(episodes, str(path), _described(meta, len(demos), filter_key), tuple(notes))


def read_env_args(path: str | Path) -> dict[str, Any]:
    """A robomimic file's description of its environment: what robosuite_env.env_from_metadata takes."""
    path = Path(path)
    with opened(path) as file:
        return _env_args(path, file)


def robosuite_version(env_args: Mapping) -> tuple[int, ...]:
    """(1, 4, 1) for "1.4.1"; (0,) where none is stated, as in robomimic v0.1."""
    found = re.match(r"\d+(\.\d+)*", str(env_args.get("env_version") or ""))
    return tuple(map(int, found[0].split("."))) if found else (0,)


# ---- the file --------------------------------------------------------------------------------------------------------------------------------

def _env_args(path: Path, file: h5py.File) -> dict[str, Any]:
    group = _demonstrations(path, file)
    if "env_args" not in group.attrs:
        raise DataError(f"{path}: attribute 'env_args' of 'data' is missing; robomimic keeps the environment's description there")
    if group.attrs.get_id("env_args").dtype.kind == "S":
        text = group.attrs["env_args"]
    else:
        text = _texts(path, "data", "env_args")[0]
    try:
        meta = json.loads(text)
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: attribute 'env_args' of 'data' is not JSON ({error})") from error
    if not isinstance(meta, dict) or not isinstance(meta.get("env_name"), str):
        raise DataError(f"{path}: attribute 'env_args' of 'data' must be an object with 'env_name', got {str(meta)[:100]}")
    return meta


def _texts(path: Path, key: str, attribute: str = "") -> list[Any]:
    """Variable-size text, read by a process of its own: HDF5 can hang on a damaged one, and nothing stops it within this process."""
    try:
        done = subprocess.run([sys.executable, "-c", READ_TEXT, str(path), key, attribute], capture_output=True, timeout=TEXT_SECONDS, check=True)
        return json.loads(done.stdout)
    except (subprocess.SubprocessError, ValueError) as error:
        raise DataError(f"{path}: the text in '{key}'{f', attribute {attribute!r},' if attribute else ''} cannot be read; the file is damaged") from error


def _demonstrations(path: Path, file: h5py.File) -> h5py.Group:
    group = file.get("data")
    if not isinstance(group, h5py.Group):
        raise DataError(f"{path}: group 'data' is missing; a robomimic file has data/demo_0, data/demo_1, ... The file has {key_names(file)}")
    return group


def _demos(path: Path, file: h5py.File, filter_key: str | None) -> list[str]:
    """Names below the root ("data/demo_7"), by number."""
    there = {}
    for name in _demonstrations(path, file):
        number = DEMO.fullmatch(str(name))
        if number is None:
            raise DataError(f"{path}: data/{name} is no demonstration; expected data/demo_<number>")
        there[str(name)] = int(number[1])
    if not there:
        raise DataError(f"{path}: 'data' holds no demonstration; expected data/demo_0, data/demo_1, ...")
    chosen = set(there)
    if filter_key is not None:
        masks = file.get("mask")
        known = sorted(str(name) for name in masks) if isinstance(masks, h5py.Group) else []
        if filter_key not in known:
            raise DataError(f"{path}: key 'mask/{filter_key}' is missing; there is {', '.join(known) or 'no mask at all'}")
        chosen = _listed(path, masks[filter_key], f"mask/{filter_key}")
        missing = sorted(chosen - set(there))
        if missing:
            raise DataError(f"{path}: mask/{filter_key} names {missing[0]}, which data/ does not have, and so {len(missing)} of its {len(chosen)}")
        if not chosen:
            raise DataError(f"{path}: mask/{filter_key} names no demonstration")
    return [f"data/{name}" for name in sorted(chosen, key=there.__getitem__)]


def _listed(path: Path, item: h5py.Dataset | h5py.Group, key: str) -> set[str]:
    if not isinstance(item, h5py.Dataset) or item.ndim != 1 or item.dtype.kind not in "SO":
        raise DataError(f"{path}: key '{key}' must be a list of names such as demo_0, got {item}")
    return set(np.char.decode(item[()], errors="replace").tolist() if item.dtype.kind == "S" else map(str, _texts(path, key)))


def _usual_keys(path: Path, file: h5py.File, demo: str) -> list[str]:
    obs = _observations(path, file, demo)
    robots = [i for i in range(10) if f"robot{i}_eef_pos" in obs]
    if not robots:
        raise DataError(f"{path}: {demo}/obs has no robot0_eef_pos; it has {', '.join(obs) or 'nothing'} (obs_keys chooses others)")
    return ["object", *(f"robot{i}_{key}" for i in robots for key in ROBOT_KEYS)]


def _observations(path: Path, file: h5py.File, demo: str) -> h5py.Group:
    obs = file.get(f"{demo}/obs")
    if not isinstance(obs, h5py.Group):
        inside = ", ".join(file[demo]) if isinstance(file[demo], h5py.Group) else file[demo]
        raise DataError(f"{path}: group '{demo}/obs' is missing; it has {inside}. A raw demo.hdf5 holds simulator states only: "
                        "make observations with robomimic's script dataset_states_to_obs.py")
    return obs


def _episode(path: Path, file: h5py.File, demo: str, keys: Sequence[str], left: int | None, keep_success: bool) -> tuple[Episode | None, End]:
    """The first `left` transitions of a demonstration, and what became of one whose next observation is unknown; None where nothing is left without it."""
    _observations(path, file, demo)
    steps = len(_rows(path, file, f"{demo}/actions", 2))
    used = steps if left is None else min(steps, left)
    known = file.get(f"{demo}/next_obs") is not None
    columns = {"obs": [], "next_obs": []}
    for part in ("obs", "next_obs") if known else ("obs",):
        for key in keys:
            name = f"{demo}/{part}/{key}"
            rows = len(_rows(path, file, name, 2))
            if rows != steps:
                raise DataError(f"{path}: key '{name}' has {rows} rows, expected {steps} like '{demo}/actions'")
            value = read_numbers(path, file, name, min(steps, used + (part == "obs")), 2)
            size = SIZES.get(key.split("_", 1)[-1])
            if size is not None and value.shape[1] != size:
                raise DataError(f"{path}: key '{name}' has {value.shape[1]} columns, expected {size}")
            columns[part].append(value)
    rows = len(_rows(path, file, f"{demo}/rewards", 1))
    if rows != steps:
        raise DataError(f"{path}: key '{demo}/rewards' has {rows} rows, expected {steps} like '{demo}/actions'")
    actions, rewards = read_numbers(path, file, f"{demo}/actions", used, 2), read_numbers(path, file, f"{demo}/rewards", used, 1)
    wrong = np.argwhere(np.abs(actions) > 1 + ACTION_TOLERANCE)
    if len(wrong):
        row, column = wrong[0].tolist()
        raise DataError(f"{path}: {demo}/actions[{row}, {column}] is {actions[row, column]:g}; expected actions in [-1, 1], "
                        f"and {len(wrong)} values lie outside")
    observations = np.concatenate(columns["obs"], axis=1)                           # (used or used + 1, Do)
    if known:
        following = np.concatenate(columns["next_obs"], axis=1)                     # (used, Do)
        joined = len(observations) - 1
        gap = np.flatnonzero(~np.isclose(following[:joined], observations[1:], rtol=1e-4, atol=1e-5).all(1))
        if len(gap):
            raise DataError(f"{path}: {demo}/next_obs[{gap[0]}] is not {demo}/obs[{gap[0] + 1}], and so at {len(gap)} rows; expected rows in time order")
        observations = np.concatenate([observations[:used], following[-1:]])
    end: End = "known"
    if not known and used == steps:
        if keep_success and rewards[-1] >= 1:
            observations, end = np.concatenate([observations, observations[-1:]]), "repeated"
        else:
            used, end = used - 1, "dropped"
    return Episode(observations[:used + 1], actions[:used], rewards[:used], False) if used else None, end


def _rows(path: Path, file: h5py.File, key: str, dims: int) -> h5py.Dataset:
    item = file.get(key)
    if isinstance(item, h5py.Dataset) and item.shape and item.shape[0] == 0:
        raise DataError(f"{path}: key '{key}' has no rows; a demonstration needs at least one step")
    return dataset_of(path, file, key, dims)


# ---- the order of the object's columns -------------------------------------------------------------------------------------------------------

def _in_our_order(path: Path, task: str, episodes: list[Episode], notes: list[str]) -> list[Episode]:
    """The episodes with the object's columns in the order of object_vector, which is told from robosuite 1.5's by what fits the gripper's positions."""
    layout = LAYOUTS[task]
    width = sum(size for _, size in layout.stored)
    expected = width + layout.robots * sum(SIZES.values())
    got = episodes[0].observations.shape[1]
    if got != expected:
        raise DataError(f"{path}: {task}'s object and robot(s) have {got} columns, expected {expected}: {width} of the object and 9 of each robot")
    rows = np.concatenate([e.observations[:-1] for e in episodes])
    errors = [_misfit(task, rows, order) for order in (layout.stored, layout.stored15)]
    if min(errors) > SAME:
        raise DataError(f"{path}: the columns of {task}'s 'object' are of no known order: what should be relative to the gripper is {min(errors):.2g} m off "
                        "(median; obs_keys reads them as they are)")
    if errors[0] <= errors[1]:
        return episodes
    notes.append("object's columns put from robosuite 1.5's order into that of robosuite before 1.5, and what is relative computed anew")
    return [Episode(_reordered(task, e.observations), e.actions, e.rewards, e.terminated) for e in episodes]


def _reordered(task: str, observations: np.ndarray) -> np.ndarray:
    parts, robots = _parts(task, observations, LAYOUTS[task].stored15)
    width = sum(size for _, size in LAYOUTS[task].stored)
    return np.concatenate([object_vector(task, parts, robots).astype(np.float32), observations[:, width:]], axis=1)


def _misfit(task: str, observations: np.ndarray, order: tuple[tuple[str, int], ...]) -> float:
    """Metres (median) by which relative positions differ from those computed, if the columns have this order."""
    parts, robots = _parts(task, observations, order)
    computed = _relative(task, parts, robots)
    errors = [np.abs(parts[key] - (computed[key] if key in computed else -computed["cube_to_gripper"])).max(1) for key, size in order
              if size == 3 and key not in dict(LAYOUTS[task].absolute)]
    return float(np.median(np.max(errors, axis=0)))


def _parts(task: str, observations: np.ndarray, order: tuple[tuple[str, int], ...]) -> tuple[dict[str, np.ndarray], list[list[np.ndarray]]]:
    """{name: (T, columns)} of the object, and [eef_pos, eef_quat, gripper_qpos] of each robot, as views of observations (T, Do)."""
    found, at = {}, 0
    for key, size in order:
        found[key] = observations[:, at:at + size]
        at += size
    robots = []
    for _ in range(LAYOUTS[task].robots):
        robots.append([])
        for key in ROBOT_KEYS:
            robots[-1].append(observations[:, at:at + SIZES[key]])
            at += SIZES[key]
    return found, robots


def _relative(task: str, absolute: Mapping[str, np.ndarray], robots: Sequence[Sequence[np.ndarray]]) -> dict[str, np.ndarray]:
    hands = [robot[0] for robot in robots]
    if task == "Lift":
        return {"cube_to_gripper": hands[0] - absolute["cube_pos"]}
    if task == "TwoArmTransport":
        payload, lid, trash = (absolute[key] for key in ("payload_pos", "lid_handle_pos", "trash_pos"))
        return {"gripper0_to_payload": payload - hands[0], "gripper0_to_lid_handle": lid - hands[0],
                "gripper1_to_payload": payload - hands[1], "gripper1_to_trash": trash - hands[1]}
    (position, _), (quaternion, _) = LAYOUTS[task].absolute
    to_hand = robots[0][1] * np.array([-1, -1, -1, 1], np.float32)                  # conjugate: from the world into the gripper's frame
    place = _product(_product(to_hand, _pure(absolute[position] - hands[0])), robots[0][1])[..., :3]
    turn = _product(to_hand, absolute[quaternion])
    (to_position, _), (to_quaternion, _) = LAYOUTS[task].stored[2:]
    return {to_position: place, to_quaternion: np.where(turn[..., 3:] < 0, -turn, turn)}


def _pure(vector: np.ndarray) -> np.ndarray:
    return np.concatenate([vector, np.zeros_like(vector[..., :1])], axis=-1)


def _product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Product of quaternions (..., 4), xyzw."""
    u, v, s, t = a[..., :3], b[..., :3], a[..., 3:], b[..., 3:]
    return np.concatenate([s * v + t * u + np.cross(u, v), s * t - (u * v).sum(-1, keepdims=True)], axis=-1)


# ---- metadata --------------------------------------------------------------------------------------------------------------------------------

def _described(meta: Mapping, demos: int, filter_key: str | None) -> dict[str, Any]:
    kwargs = meta.get("env_kwargs") if isinstance(meta.get("env_kwargs"), Mapping) else {}
    configs = kwargs.get("controller_configs")
    config = configs[0] if isinstance(configs, list) and configs else configs
    controller = config.get("type", "not stated") if isinstance(config, Mapping) else "not stated"
    stated = {"controller_configs": json.dumps(configs)} if isinstance(config, Mapping) else {}                      # text: metadata is no deeper
    return {"layout": "robomimic", "env_name": meta["env_name"], "robosuite": str(meta.get("env_version", "not stated (robomimic v0.1)")),
            "controller": str(controller), **stated, "demonstrations": demos, **({"filter_key": filter_key} if filter_key else {})}
