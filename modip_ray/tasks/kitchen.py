"""D4RL's Franka kitchen on gymnasium-robotics' model, with D4RL's collisions, observation noise, controller and reward."""
from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import gymnasium as gym
import mujoco
import numpy as np

#: Subtasks of kitchen-complete-v0 and kitchen-partial-v0 (one environment, two data sets), and of kitchen-mixed-v0.
COMPLETE = ("microwave", "kettle", "light switch", "slide cabinet")
MIXED = ("microwave", "kettle", "bottom burner", "light switch")

JOINTS = 9                                  # of the robot; they come first in qpos
POSITIONS = 30                              # of robot and objects
SUBSTEPS = 40
ACTION_SPEED = 2.0                          # rad/s (m/s for the fingers) that an action of 1 stands for
NOISE = 0.1                                 # share of the sensors' noise amplitudes that D4RL adds
DRAWS = 60                                  # random numbers an observation takes in D4RL: positions and velocities of robot and objects
START = np.array([
    1.48388023e-01, -1.76848573e+00, 1.84390296e+00, -2.47685760e+00, 2.60252026e-01, 7.12533105e-01, 1.59515394e+00, 4.79267505e-02, 3.71350919e-02,
    -2.66279850e-04, -5.18043486e-05, 3.12877220e-05, -4.51199853e-05, -3.90842156e-06, -4.22629655e-05, 6.28065475e-05, 4.04984708e-05, 4.62730939e-04,
    -2.26906415e-04, -4.65501369e-04, -6.44129196e-03, -1.77048263e-03, 1.08009684e-03, -2.69397440e-01, 3.50383255e-01, 1.61944683e+00, 1.00618764e+00,
    4.06395120e-03, -6.62095997e-03, -2.68278933e-04])


def kitchen_env(tasks: Sequence[str] = COMPLETE, noise: bool = True, render_mode: str | None = None, width: int = 480, height: int = 480) -> Kitchen:
    """D4RL's kitchen with these subtasks; see `Kitchen`."""
    return Kitchen(tasks, noise, render_mode, width, height)


class Kitchen(gym.Env):
    """Observation (60,): 30 joint positions of robot and objects with sensor noise, then the goal, 0 where no subtask sets one. Action (9,) in [-1, 1].

    The reward is the number of subtasks done for the first time at this step, so the return is 0..len(tasks); the episode terminates when all are done.
    A subtask is done when its joints' OBSERVED positions are within 0.3 of its goal. An action is a joint speed: the position servos' target is the
    OBSERVED joint position + 2 x action x 0.08 s, so the noise acts on the motion too (D4RL's controller).

    observed     : (30,) the last observation's positions, which the next action starts from
    data         : MuJoCo's state. The model is shared by all kitchens of a process: do not change it.
    sensor_noise : (30,) largest noise of each position, added uniformly where `noise` is True
    columns      : {subtask: its positions}; goal (30,); near: the distance to the goal that counts as done
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 12}

    def __init__(self, tasks: Sequence[str] = COMPLETE, noise: bool = True, render_mode: str | None = None, width: int = 480, height: int = 480):
        kitchen = _library()
        unknown = [task for task in tasks if task not in kitchen.OBS_ELEMENT_GOALS]
        if unknown or not tasks or isinstance(tasks, str) or len(set(tasks)) < len(tasks):
            raise ValueError(f"tasks must be a list of different subtasks out of {', '.join(kitchen.OBS_ELEMENT_GOALS)}; got {tasks!r}")
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"render_mode {render_mode!r} is not supported; use 'rgb_array' or None")
        self.tasks, self.render_mode = tuple(tasks), render_mode
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (2 * POSITIONS,), np.float64)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (JOINTS,), np.float32)
        self.model = _model(render_mode is not None)
        self.data = mujoco.MjData(self.model)
        self.sensor_noise, self._low, self._high = _sensors()
        self._noise = self.sensor_noise if noise else None
        self.columns = {task: kitchen.OBS_ELEMENT_INDICES[task] for task in self.tasks}
        self.goal, self.near = np.zeros(POSITIONS), kitchen.BONUS_THRESH
        for task in self.tasks:
            self.goal[self.columns[task]] = kitchen.OBS_ELEMENT_GOALS[task]
        self._seconds = SUBSTEPS * self.model.opt.timestep
        self._left: list[str] = []
        self._size, self._renderer = (width, height), None
        self.observed = START.copy()

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        mujoco.mj_resetData(self.model, self.data)
        self.data.qpos[:] = START
        mujoco.mj_forward(self.model, self.data)
        self._left = list(self.tasks)
        return self._observe(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        """info["done"]: names of the subtasks done for the first time at this step."""
        speed = ACTION_SPEED * np.clip(np.asarray(action, np.float64), -1.0, 1.0)
        self.data.ctrl[:] = np.clip(self.observed[:JOINTS] + speed * self._seconds, self._low, self._high)
        mujoco.mj_step(self.model, self.data, nstep=SUBSTEPS)
        observation = self._observe()
        off = self.observed - self.goal
        done = [task for task in self._left if np.linalg.norm(off[self.columns[task]]) < self.near]
        for task in done:
            self._left.remove(task)
        return observation, float(len(done)), not self._left, False, {"done": done}

    def _observe(self) -> np.ndarray:
        self.observed = self.data.qpos.copy()
        if self._noise is not None:
            drawn = self.np_random.uniform(-1.0, 1.0, DRAWS)                        # D4RL's order: robot positions, velocities, object positions, velocities
            self.observed += self._noise * np.concatenate([drawn[:JOINTS], drawn[2 * JOINTS:JOINTS + POSITIONS]])
        return np.concatenate([self.observed, self.goal])

    def render(self) -> np.ndarray | None:
        """(height, width, 3) uint8 with render_mode "rgb_array", else None."""
        if self.render_mode is None:
            return None
        if self._renderer is None:
            from gymnasium.envs.mujoco.mujoco_rendering import MujocoRenderer
            from gymnasium_robotics.envs.franka_kitchen.franka_env import DEFAULT_CAMERA_CONFIG
            self._renderer = MujocoRenderer(self.model, self.data, DEFAULT_CAMERA_CONFIG, *self._size)
        return self._renderer.render(self.render_mode)

    def close(self) -> None:
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None


def newly_done(rewards: np.ndarray) -> np.ndarray:
    """The environment's rewards (T,) of ONE episode out of a D4RL kitchen file's, which hold the number of subtasks done NOW.

    The file's reward is the count at the row's own observation, so the reward of transition t comes from row t+1; the last one is 0, what it did is
    not on file. The running maximum makes a subtask that comes undone count once; the sum is the episode's score, the greatest count after its start.
    ValueError where a reward is not a whole number >= 0.
    """
    counts = np.asarray(rewards)
    if counts.ndim != 1 or len(counts) == 0:
        raise ValueError(f"rewards must have shape (T,) with T >= 1, got {counts.shape}")
    wrong = np.flatnonzero((counts < 0) | (counts != np.round(counts)))
    if len(wrong):
        raise ValueError(f"rewards[{wrong[0]}] is {counts[wrong[0]]}; a kitchen file holds numbers of subtasks, 0, 1, 2, ...")
    most = np.maximum.accumulate(counts[1:])
    return np.append(np.diff(most, prepend=0), 0).astype(np.float32)


# ---- the library's parts ---------------------------------------------------------------------------------------------------------------------

@functools.cache
def _library() -> ModuleType:
    """gymnasium-robotics' kitchen: model files, sensors, goals. Imported when first needed, without the notice that it prints."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            from gymnasium_robotics.envs.franka_kitchen import kitchen_env as module
    except ImportError as error:
        raise ImportError(f"the kitchen tasks need gymnasium-robotics ({error}); pip install gymnasium-robotics==1.4.2") from error
    return module


def _assets() -> Path:
    return Path(_library().__file__).resolve().parents[1] / "assets" / "kitchen_franka"


@functools.cache
def _model(visual: bool) -> mujoco.MjModel:
    """The kitchen without collisions of the robot's stand, as D4RL has it. Not `visual`: without what is only seen; the same motion bit for bit."""
    spec = mujoco.MjSpec.from_file(str(_assets() / "kitchen_assets" / "kitchen_env_model.xml"))
    for geom in spec.body("panda0_link0").parent.geoms:
        geom.contype = geom.conaffinity = 0
    spec.compiler.discardvisual = not visual
    return spec.compile()


@functools.cache
def _sensors() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Largest noise of each observed position (30,), and the range (9,), (9,) of the servos' targets."""
    from gymnasium_robotics.envs.franka_kitchen.utils import get_config_root_node, read_config_from_node
    root, _ = get_config_root_node(config_file_name=str(_assets() / "franka_assets" / "franka_config.xml"))
    amplitude = [read_config_from_node(root, f"qpos{i}", "pos_noise_amp", float)[0] for i in range(POSITIONS)]
    bounds = np.stack([read_config_from_node(root, f"qpos{i}", "pos_bound", float) for i in range(JOINTS)])
    return NOISE * np.array(amplitude), bounds[:, 0], bounds[:, 1]
