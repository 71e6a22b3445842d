"""Where a run's offline data come from: a dataset that exists, or a policy that is rolled out once and kept in a file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np

from modip_ray.config import Config, ConfigError, Task
from modip_ray.learning.env_source import known_family, spaces
from modip_ray.tasks.catalogue import catalogue
from modip_ray.tasks.collect import Policy, collect
from modip_ray.tasks.d4rl_data import DataError, Dataset, write_d4rl
from modip_ray.tasks.demonstrator import DEMONSTRATORS, TanhGaussianPolicy, demonstrator_path
from modip_ray.tasks.envs import EnvFactory
from modip_ray.tasks.episode import Episode
from modip_ray.tasks.kitchen import Kitchen, newly_done
from modip_ray.tasks.readers import MINARI, read_any
from modip_ray.tasks.robomimic_data import LAYOUTS, robosuite_version
from modip_ray.tasks.robosuite_env import CONTROLLER, common_controller, controller_config
from modip_ray.tasks.scores import env_family

Progress = Callable[[int, int], None]

POLICY = "policy:"
ROBOSUITE = "modip_ray.tasks.robosuite_env:"        # its env_kwargs say which task it is
OFFICIAL = ("mujoco", "D4RL")       # Minari's own namespaces, where a family follows; elsewhere a user may call a data set anything
GOAL_TOLERANCE = 1e-3


def source_label(cfg: Config) -> str:
    """What reports call the data."""
    if cfg.data.source == "demonstrator":
        return "demonstrator data"
    return f"data of {cfg.data.source}" if cfg.data.source.startswith(POLICY) else cfg.data.source


def load_data(cfg: Config, env_factory: EnvFactory, folder: Path, progress: Progress | None = None, download: Progress | None = None) -> Dataset:
    """The offline episodes; collected ones are written to data.cache (or `folder`/data.hdf5) and read from there ever after.

    progress: called with transitions (done, asked for) while collecting; download: with bytes (there, in all) while fetching an official file.
    DataError where a file is unsound, fits another environment, or was collected with other settings.
    """
    made: list[gym.Env] = []

    def remembered() -> gym.Env:
        made.append(env_factory())
        return made[-1]
    obs_dim, low, high = spaces(remembered, try_step=True)
    source = stored_source(cfg, folder)
    if rolls_out(cfg.data.source):
        if cfg.data.filter_key is not None:
            raise DataError(f"data.filter_key is {cfg.data.filter_key!r}, but only robomimic files have such keys, and data.source={cfg.data.source} collects "
                            "data; set data.filter_key=null")
        path = Path(source)
        if not path.is_file():
            collect_to(cfg, policy_of(cfg.data.source, cfg.task.family), env_factory, path, progress)
    dataset = read_any(source, max_transitions=cfg.data.max_transitions, max_episode_steps=cfg.task.max_episode_steps,
                       action_range=(float(low.min()), float(high.max())), filter_key=cfg.data.filter_key,
                       keep_success=cfg.data.rewards == "until_success", progress=download)
    if rolls_out(cfg.data.source):
        check_origin(cfg, dataset, path)
    else:
        check_task(cfg, dataset)
    first = dataset.episodes[0]
    for key, expected in (("observations", obs_dim), ("actions", len(low))):
        got = getattr(first, key).shape[1]
        if got != expected:
            raise DataError(f"{source}: {key} have {got} columns, but {cfg.task.env} has {expected}; is data.source for another task than task.env?")
    kitchen = getattr(made[0], "unwrapped", made[0])
    if isinstance(kitchen, Kitchen):
        check_goal(kitchen, dataset)
    if cfg.data.rewards == "newly_done":
        return with_newly_done(dataset, len(kitchen.tasks) if isinstance(kitchen, Kitchen) else None)
    return until_success(dataset) if cfg.data.rewards == "until_success" else dataset


def stored_source(cfg: Config, folder: Path) -> str:
    """What to read: the named dataset, or the file where what was collected is kept."""
    if not rolls_out(cfg.data.source):
        return cfg.data.source
    return str(Path(cfg.data.cache).expanduser() if cfg.data.cache else folder / "data.hdf5")


def with_newly_done(dataset: Dataset, subtasks: int | None = None) -> Dataset:
    """The kitchen's own rewards, in place of the counts that D4RL's kitchen files store. DataError where rewards are no counts, or nothing is left.

    The files mark the last row of every demonstration as terminal, whatever was done. Where the environment has `subtasks` of them, those that leave some
    undone are cut, not terminated; those that do all stay whole. What these do behind the last subtask, where the environment has ended, earns nothing, but
    the policy is better for it (docs/method.md).
    """
    try:
        episodes = [replace(e, rewards=newly_done(e.rewards)) for e in dataset.episodes]
    except ValueError as error:
        raise DataError(f"{dataset.source}: data.rewards is newly_done, which is for D4RL's kitchen files: {error}") from error
    notes = ["rewards: newly done subtasks, from the number done so far that the file stores"]
    undone = [subtasks is not None and e.ret < subtasks for e in episodes]
    if any(undone):
        notes.append(f"{sum(undone)} of {len(episodes)} episodes leave subtasks undone: cut, not terminated as the file has it")
        ended = [as_cut(e) if cut else e for e, cut in zip(episodes, undone, strict=True)]
        episodes = [e for e in ended if e.length]
        if not episodes:
            raise DataError(f"{dataset.source}: no episode has a step whose next observation is known; expected D4RL's kitchen data")
    return replace(dataset, episodes=episodes, notes=(*dataset.notes, *notes))


def as_cut(episode: Episode) -> Episode:
    """The episode as one that did not terminate; one marked so loses its last step, if the observation behind that repeats the one before (see `read_d4rl`)."""
    n = episode.length - int(episode.terminated and (episode.observations[-1] == episode.observations[-2]).all())
    return Episode(episode.observations[:n + 1], episode.actions[:n], episode.rewards[:n], False)


def until_success(dataset: Dataset) -> Dataset:
    """Episodes that end, terminated, with their first reward of 1; those without one stay as they are."""
    episodes, solved = [], 0
    for episode in dataset.episodes:
        successes = np.flatnonzero(episode.rewards >= 1)
        if len(successes):
            n, solved = int(successes[0]) + 1, solved + 1
            episode = Episode(episode.observations[:n + 1], episode.actions[:n], episode.rewards[:n], True)
        episodes.append(episode)
    return replace(dataset, episodes=episodes, notes=(*dataset.notes, f"{solved} of {len(episodes)} episodes end at their success"))


def rolls_out(source: str) -> bool:
    """The source is a policy that makes the data, not a dataset."""
    return source == "demonstrator" or source.startswith(POLICY)


def policy_file(source: str) -> str:
    return os.path.expanduser(source.removeprefix(POLICY))      # as it is written else: older files of collected data say it so


def policy_of(source: str, family: str | None) -> TanhGaussianPolicy:
    """The policy named by "demonstrator" or "policy:<hdf5>"."""
    if source == "demonstrator":
        if family not in DEMONSTRATORS:
            raise ConfigError(f"data.source: there is no demonstrator for task.family={family!r} (only {', '.join(DEMONSTRATORS)}); "
                              "give data.source a file, a catalogue name (modip data list) or minari:<id>")
        return TanhGaussianPolicy.from_npz(demonstrator_path(family))
    return TanhGaussianPolicy.from_d4rl(policy_file(source))


def collect_to(cfg: Config, policy: Policy, env_factory: EnvFactory, path: Path, progress: Progress | None = None) -> None:
    """Roll a policy out and write D4RL's layout, with where it came from in the metadata; DataError for a policy of another environment."""
    if isinstance(policy, TanhGaussianPolicy):
        check_policy(cfg, policy, env_factory)
    episodes = collect(policy, env_factory, cfg.data.transitions, cfg.task.max_episode_steps, cfg.seed, progress=progress)
    metadata = origin(cfg)
    if isinstance(policy, TanhGaussianPolicy):
        metadata["policy"] = policy.to_metadata()
    write_d4rl(path, episodes, metadata)


def check_policy(cfg: Config, policy: TanhGaussianPolicy, env_factory: EnvFactory) -> None:
    """DataError for a policy of other sizes, or of another family where its file's name, or the demonstrator, tells it."""
    obs_dim, low, _ = spaces(env_factory)
    for what, got, expected in (("observations", policy.obs_dim, obs_dim), ("actions", policy.action_dim, len(low))):
        if got != expected:
            raise DataError(f"{cfg.data.source}: the policy is for {what} of {got} numbers, but {cfg.task.env} has {expected}; give data.source the policy of "
                            "that environment, or task=NAME the policy's")
    found, family = cfg.task.family if cfg.data.source == "demonstrator" else family_named(policy_file(cfg.data.source)), task_family(cfg.task)
    if None not in (found, family) and found != family:
        raise DataError(f"{cfg.data.source}: the policy is of {found}, but the task is of {family} (task.env={cfg.task.env!r}, "
                        f"task.family={cfg.task.family!r}); give data.source the policy of that environment, or task=NAME the policy's")


def origin(cfg: Config) -> dict:
    """What decides the collected episodes; in a file's metadata."""
    source = f"{POLICY}{policy_file(cfg.data.source)}" if cfg.data.source.startswith(POLICY) else cfg.data.source
    return {"env": cfg.task.env, "env_kwargs": json.dumps(cfg.task.env_kwargs, sort_keys=True), "max_episode_steps": cfg.task.max_episode_steps,
            "source": source, "transitions_asked": cfg.data.transitions, "seed": cfg.seed}


def check_origin(cfg: Config, dataset: Dataset, path: Path) -> None:
    """A kept file must come from the environment, policy and number of transitions that are asked for. Another seed will do, and so does an older file that
    does not say all of it."""
    for key, value in origin(cfg).items():
        found = dataset.metadata.get(key, value)
        if key != "seed" and found != value:
            raise DataError(f"{path}: was collected with {key}={found!r}, this run asks for {value!r}; delete the file, or set data.cache to another one")


# ---- are the data of this task? --------------------------------------------------------------------------------------------------------------

def check_task(cfg: Config, dataset: Dataset) -> None:
    """DataError where what the data say of themselves, or an official name, tells that they are of another task than task.env. Own data may say nothing."""
    task, name = cfg.task, dataset.metadata.get("env_name")
    if name in LAYOUTS and task.env.startswith(ROBOSUITE) and name != task.env_kwargs.get("name"):
        raise DataError(f"{dataset.source}: holds demonstrations of {name}, but task.env_kwargs.name is {task.env_kwargs.get('name')!r}; "
                        "give data.source a file of that task, or task=NAME the one of these data")
    if "robosuite" in dataset.metadata and task.env.startswith(ROBOSUITE):
        check_gripper(task, dataset)
        check_controller(task, dataset)
    found, told = data_family(cfg, dataset)
    expected = task_family(task)
    if found is not None and expected is not None and found != expected:
        raise DataError(f"{dataset.source}: {told!r} is data of {found}, but the task is of {expected} (task.env={task.env!r}, task.family={task.family!r}); "
                        "give data.source data of that task, or task=NAME the one of these data (task.family=null for an environment of your own)")


def check_gripper(task: Task, dataset: Dataset) -> None:
    """DataError where the file is of robosuite 1.5 and task.env_kwargs does not say which gripper moves: the default is that of before.

    The file alone does not tell: robomimic's own files of 1.5 are demonstrations recorded before it, with observations extracted anew. What is said, counts.
    """
    version = str(dataset.metadata.get("robosuite"))
    if robosuite_version({"env_version": version}) < (1, 5) or "gripper_ramp" in task.env_kwargs:
        return
    own, before = (json.dumps({**task.env_kwargs, "gripper_ramp": ramp}) for ramp in (False, True))
    raise DataError(f"{dataset.source}: is of robosuite {version}, whose gripper differs from the one before 1.5, which task.env_kwargs has unless it says "
                    f"otherwise; say which moves: task.env_kwargs='{own}' for robosuite 1.5's (demonstrations recorded with it), or '{before}' for the one "
                    "before (recorded before 1.5, as RoboMimic's own are, and converted)")


def check_controller(task: Task, dataset: Dataset) -> None:
    """DataError where the file states another controller than task.env_kwargs asks for; it may state none."""
    if "controller_configs" not in dataset.metadata:
        return
    try:
        found = common_controller(json.loads(dataset.metadata["controller_configs"]))
    except (ValueError, TypeError) as error:
        raise DataError(f"{dataset.source}: was recorded with a controller that {task.env} does not have ({error}); give data.source data of RoboMimic's "
                        "OSC_POSE controller, or task.env an environment of your own") from error
    expected = controller_config(task.env_kwargs.get("controller") or CONTROLLER)
    differing = [f"{key} is {found[key]!r} there, {expected[key]!r} here" for key in found if found[key] != expected[key]]
    if differing:
        own = {key: value for key, value in found.items() if value != CONTROLLER[key]}
        given = {key: value for key, value in task.env_kwargs.items() if key != "controller"} | ({"controller": own} if own else {})
        raise DataError(f"{dataset.source}: was recorded with another controller than {task.env} has: {'; '.join(differing[:3])}; give data.source data of the "
                        f"task's controller, or the task these data's: task.env_kwargs='{json.dumps(given)}'")


def data_family(cfg: Config, dataset: Dataset) -> tuple[str | None, str]:
    """Family (as task.family) of the environment that the data come from, None where nothing tells, and the name that does."""
    own = dataset.metadata
    env, made_from = own.get("env"), own.get("converted_from")
    minari_id = f"{MINARI}{own['minari_id']}" if "minari_id" in own else None
    told = [(env_family(env), env)] if isinstance(env, str) else []
    told += [(family_named(name), name) for name in (minari_id, cfg.data.source, made_from) if isinstance(name, str)]
    return next(((family, name) for family, name in told if family is not None), (None, ""))


def family_named(source: str) -> str | None:
    """Family of "minari:mujoco/hopper/medium-v0", of "d4rl/hopper_medium-v2", or of a file with such an official name; None for any other."""
    if source.startswith(MINARI):
        parts = source.removeprefix(MINARI).split("/")
        return env_family(parts[1]) if len(parts) == 3 and parts[0] in OFFICIAL else None
    file = Path(source).name
    for entry in catalogue().values():
        stem = entry.address.rsplit("/", 1)[-1].removesuffix(".hdf5")
        if entry.name.startswith("d4rl/") and (source == entry.name or file.startswith(f"{stem}.")):
            return env_family(entry.name.replace("_", "-"))
    return None


def task_family(task: Task) -> str | None:
    """Family of the environment where its id is of one, else task.family."""
    return known_family(task) or task.family


def check_goal(env: Kitchen, dataset: Dataset) -> None:
    """DataError where no episode has the goal of the kitchen's subtasks, which the last columns of an observation hold."""
    goals = np.stack([e.observations[0, -len(env.goal):] for e in dataset.episodes])            # (episodes, 30)
    wrong = np.abs(goals - env.goal) > GOAL_TOLERANCE
    if wrong.any(1).all():
        columns = np.flatnonzero(wrong[0])
        at = dataset.episodes[0].observations.shape[1] - len(env.goal) + columns[0]
        raise DataError(f"{dataset.source}: observations[0, {at}], a column of the goal, is {goals[0, columns[0]]:.3g}, but {env.goal[columns[0]]:.3g} for the "
                        f"subtasks {', '.join(env.tasks)}, and {len(columns)} of {len(env.goal)} columns differ; are these data for other subtasks "
                        "(task.env_kwargs.tasks)?")
