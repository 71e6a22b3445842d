"""The environment that a run's settings name, as a factory that crosses processes. No torch, no Ray."""

from __future__ import annotations

import functools
import importlib
import re

import gymnasium as gym
import numpy as np

from modip_ray.config import ConfigError, Task, nearest
from modip_ray.config.rules import shown
from modip_ray.tasks.envs import EnvError, EnvFactory, make_env, make_envs, reset_env, run_chunk
from modip_ray.tasks.scores import REFERENCE, env_family

OLD_PHYSICS = "modip_ray.tasks.d4rl_physics:"       # its env_kwargs say which environment it is


def env_factory(task: Task) -> EnvFactory:
    """Makes `task.env`: a gymnasium id, or "module:Class" (or "module:function"), with task.env_kwargs as keyword arguments."""
    if ":" in task.env and not re.search(r"-v\d+$", task.env):
        return functools.partial(own_env, own_class(task.env), task.env, task.env_kwargs)
    return functools.partial(registered_env, task.env, **task.env_kwargs)


def registered_env(env_id: str, render_mode: str | None = None, **kwargs) -> gym.Env:
    """A gymnasium environment by id; ConfigError where gymnasium does not know it."""
    try:
        return make_env(env_id, render_mode, **kwargs)
    except gym.error.Error as error:
        raise ConfigError(f"task.env: gymnasium cannot make {env_id!r} ({error}); give a registered id, or 'module:Class' of your own") from error
    except TypeError as error:
        if render_mode is not None:
            raise
        raise ConfigError(f"task.env: {env_id} cannot be made with task.env_kwargs={kwargs}: {error}") from error


def own_env(make: EnvFactory, name: str, kwargs: dict, **more: object) -> gym.Env:
    """make(**kwargs, **more); ConfigError where a package is missing or the arguments do not suit."""
    try:
        return make(**kwargs, **more)
    except ImportError as error:
        raise ConfigError(f"task.env: {name} cannot be made: {error}") from error
    except (TypeError, ValueError) as error:
        if more:                                                                    # what rendering asks for; not every environment takes a size
            raise
        raise ConfigError(f"task.env: {name} cannot be made with task.env_kwargs={kwargs}: {error}") from error


def own_class(name: str) -> EnvFactory:
    """The callable that "module:Class" names; ConfigError says which half of it cannot be found."""
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise ConfigError(f"task.env: cannot import {module!r} of {name!r} ({error}); it must be importable where you start the run") from error
    except AttributeError as error:
        raise ConfigError(f"task.env: {module!r} has no {attribute!r} (from {name!r}); a class that other programs are to make belongs into a module that they "
                          "can import") from error
    if not callable(found):
        raise ConfigError(f"task.env: {name!r} is {type(found).__name__}; expected a class or function that makes an environment")
    return found


def check_family(task: Task) -> None:
    """ConfigError for a family without reference scores, or of another environment, whose references would make wrong normalised scores."""
    if task.family is not None and task.family not in REFERENCE:
        known = f"known: {', '.join(REFERENCE)}; null for a task of your own"
        raise ConfigError(f"task.family: got {shown(task.family)}{nearest(task.family, list(REFERENCE))} ({known})")
    found = known_family(task)
    if task.family is not None and found is not None and found != task.family:
        raise ConfigError(f"task.family: got {task.family!r}, but {known_id(task)!r} is of {found}, whose scores are normalised otherwise; set "
                          f"task.family={found}, or task.family=null for raw scores only")


def known_family(task: Task) -> str | None:
    """Family of the environment where its id is of one; None for any other."""
    return env_family(known_id(task))


def known_id(task: Task) -> str:
    return str(task.env_kwargs.get("env_id", "Hopper-v4")) if task.env.startswith(OLD_PHYSICS) else task.env


def try_one_step(env: gym.Env) -> None:
    """EnvError where the first step of an episode cannot be made, or is of no use."""
    try:
        reset_env(env, 0, "task.env")
    except EnvError:
        raise
    except Exception as error:
        raise EnvError(f"task.env: reset(seed=0) failed with {type(error).__name__}: {error}; expected (observation, info), as gymnasium has it") from error
    box, obs, reward = env.action_space, np.zeros((1, *env.observation_space.shape), np.float32), np.zeros(1, np.float32)
    middle = ((box.low.astype(np.float64) + box.high) / 2).astype(box.dtype)
    run_chunk(env, middle[None], obs, reward, 1, "task.env")
    if not (np.isfinite(obs).all() and np.isfinite(reward).all()):
        raise EnvError(f"task.env: the first step returned observation {obs[0]} and reward {reward[0]}; both must be finite")


def spaces(factory: EnvFactory, try_step: bool = False) -> tuple[int, np.ndarray, np.ndarray]:
    """Observation size and the action box (low, high), each (Da,) and finite. ConfigError for spaces that cannot be used, EnvError for what it raises or gives.

    try_step: make one step, too. What is wrong with an environment shall show before it is trained for.
    """
    try:
        (env,) = make_envs(factory, 1)
    except (ConfigError, EnvError):
        raise
    except ValueError as error:
        raise ConfigError(f"task.env: {error}") from error
    except Exception as error:
        raise EnvError(f"task.env: the environment cannot be made, {type(error).__name__}: {error}") from error
    try:
        low, high = (np.asarray(x, np.float32) for x in (env.action_space.low, env.action_space.high))
        if not (np.isfinite(low).all() and np.isfinite(high).all() and (low < high).all()):
            raise ConfigError(f"task.env: the action space must be bounded, got low {low}, high {high}; wrap it (gymnasium.wrappers.RescaleAction)")
        if try_step:
            try_one_step(env)
        return env.observation_space.shape[0], low, high
    finally:
        env.close()
