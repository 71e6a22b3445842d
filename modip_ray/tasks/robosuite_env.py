"""RoboMimic's tasks on robosuite 1.5: low-dimensional observations, controller, gripper and reward as in RoboMimic's data."""
from __future__ import annotations

import functools
import json
import logging
import math
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np

from modip_ray.tasks.robomimic_data import LAYOUTS, ROBOT_KEYS, object_vector, robosuite_version

#: The part of the scene that robosuite draws anew with every model (a cube's edges, a hammer's head). Only these tasks need a new model for an episode.
DRAWN = {"Lift": "cube_main", "TwoArmTransport": "payload_root"}
#: RoboMimic's operational space controller, as robosuite 1.5 spells it. An action of 1 asks for 5 cm, or 0.5 rad, within a step of 50 ms.
CONTROLLER = {
    "type": "OSC_POSE", "input_max": 1, "input_min": -1, "output_max": [0.05, 0.05, 0.05, 0.5, 0.5, 0.5], "output_min": [-0.05, -0.05, -0.05, -0.5, -0.5, -0.5],
    "kp": 150, "damping_ratio": 1, "impedance_mode": "fixed", "kp_limits": [0, 300], "damping_ratio_limits": [0, 10], "position_limits": None,
    "orientation_limits": None, "uncouple_pos_ori": True, "input_type": "delta", "input_ref_frame": "world", "interpolation": None, "ramp_ratio": 0.2,
}
FIXED = ("type", "impedance_mode", "position_limits", "orientation_limits", "input_type", "interpolation")  # another value would be another kind of control
OLD_SPELLING = {"damping": "damping_ratio", "damping_limits": "damping_ratio_limits"}
CONTROL_HZ = 20
GRIPPER_STEP = 0.01             # how far the fingers' target moves in 2 ms of simulation, its range being [-1, 1]
ROBOSUITE_TYPE = 1              # robomimic's number for robosuite among its kinds of environments
MODEL_BYTES = 20_000_000        # a recorded scene has about 30 kB


def robosuite_env(name: str, controller: Mapping | None = None, gripper_ramp: bool = True, render_mode: str | None = None, camera: str = "agentview",
                  width: int = 320, height: int = 240, terminate_on_success: bool = False) -> RobosuiteEnv:
    """One of RoboMimic's tasks by robosuite's name: Lift, PickPlaceCan, NutAssemblySquare or TwoArmTransport; see `RobosuiteEnv`."""
    return RobosuiteEnv(name, controller, gripper_ramp, render_mode, camera, width, height, terminate_on_success)


def env_from_metadata(env_args: str | Mapping, render_mode: str | None = None, gripper_ramp: bool | None = None) -> RobosuiteEnv:
    """The environment that a robomimic file (v0.1, v1.4 or v1.5) was recorded in; `env_args` as read_env_args returns it, or as JSON; see env_kwargs."""
    return robosuite_env(**env_kwargs(env_args, gripper_ramp), render_mode=render_mode)


def env_kwargs(env_args: str | Mapping, gripper_ramp: bool | None = None) -> dict[str, Any]:
    """Arguments of robosuite_env, plain data, for a robomimic file's `env_args`; ValueError names what this environment cannot do, or must be told.

    gripper_ramp : None for what the file tells: True where it is of robosuite before 1.5, or of no stated version (robomimic v0.1). One of 1.5 does not
                   tell, as RoboMimic's own (`*_v15`) are demonstrations recorded before it, with observations extracted anew: it must be said, as `train` asks
    Cameras and rendering are ignored.
    """
    try:
        meta = json.loads(env_args) if isinstance(env_args, str) else env_args
        name, kwargs = meta["env_name"], meta["env_kwargs"]
        robots, controllers = kwargs["robots"], kwargs["controller_configs"]
        kind, frequency, shaping = meta.get("type", ROBOSUITE_TYPE), kwargs.get("control_freq", CONTROL_HZ), kwargs.get("reward_shaping", False)
        configuration = kwargs.get("env_configuration", "default")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"env_args is not robomimic's description of a robosuite environment ({type(error).__name__}: {error}); expected JSON with env_name, "
                         "type and env_kwargs with robots and controller_configs") from error
    robots = [robots] if isinstance(robots, str) else robots
    expected = ["Panda"] * _robots(name)
    for what, got, wanted in (("type", kind, ROBOSUITE_TYPE), ("robots", robots, expected), ("control_freq", frequency, CONTROL_HZ),
                              ("reward_shaping", shaping, False)):
        if got != wanted:
            raise ValueError(f"env_args: {what} is {got!r}; only {wanted!r} is supported for {name}")
    if configuration not in ("default", "opposed", "single-arm-opposed"):
        raise ValueError(f"env_args: env_configuration is {configuration!r}; only robots facing each other are supported ('single-arm-opposed', now 'opposed')")
    controller = common_controller(controllers)
    if gripper_ramp is None and robosuite_version(meta) >= (1, 5):
        raise ValueError(f"env_args: is of robosuite {meta['env_version']}, which does not tell the gripper; give gripper_ramp=False for robosuite 1.5's "
                         "(demonstrations recorded with it), or True for the one before (recorded before 1.5, as RoboMimic's own are, and converted)")
    return {"name": name, "controller": controller, "gripper_ramp": True if gripper_ramp is None else gripper_ramp}


def common_controller(configs: object) -> dict[str, Any]:
    """controller_config of a robomimic file's `controller_configs`: one controller's settings, or a list of equal ones, one a robot; else ValueError."""
    each = configs if isinstance(configs, list) else [configs]
    if not each or any(config != each[0] for config in each):
        raise ValueError("controller_configs differ between the robots; only one controller for all is supported")
    return controller_config(each[0])


def controller_config(config: Mapping) -> dict[str, Any]:
    """An OSC_POSE controller in robosuite 1.5's spelling, from that of 1.4 and before, or from 1.5's composite controllers (its right arm).

    What is not stated is RoboMimic's; in a composite controller the frame is then robosuite 1.5's own, "base". ValueError for another kind of control.
    """
    if isinstance(config, Mapping) and isinstance(config.get("body_parts"), Mapping):
        parts = config["body_parts"]
        arms = parts.get("arms", parts)
        config = arms.get("right") if isinstance(arms, Mapping) else arms
        config = {"input_ref_frame": "base", **config} if isinstance(config, Mapping) else config
    if not isinstance(config, Mapping):
        raise ValueError(f"controller is {config!r}; expected the settings of an OSC_POSE controller")
    new = {OLD_SPELLING.get(key, key): value for key, value in config.items() if key != "gripper"}
    if "control_delta" in new:
        new["input_type"] = "delta" if new.pop("control_delta") else "absolute"
    unknown = sorted(set(new) - set(CONTROLLER))
    if unknown:
        raise ValueError(f"controller: {', '.join(map(str, unknown))} unknown; an OSC_POSE controller has {', '.join(CONTROLLER)}")
    for key in FIXED:
        if new.get(key, CONTROLLER[key]) != CONTROLLER[key]:
            raise ValueError(f"controller: {key} is {new[key]!r}; only {CONTROLLER[key]!r} is supported")
    return {**CONTROLLER, **new}


class RobosuiteEnv(gym.Env):
    """Observation (19,) Lift, (23,) PickPlaceCan and NutAssemblySquare, (59,) TwoArmTransport; action (7,) a robot, in [-1, 1]; 20 steps a second.

    The observation is `object`, then for each robot eef_pos (3), eef_quat (4, xyzw), gripper_qpos (2). The object's columns are those of robosuite before
    1.5 (see robomimic_data.object_vector), and everything is of the very state that the step ends in, as in RoboMimic's data; robosuite itself returns what
    it sampled 2 ms earlier or more. Reward 1 while the task is in success, else 0.

    reset(seed=) draws everything from the seed: poses, and for Lift and TwoArmTransport the size of an object, for which robosuite makes a new model
    (some 0.2 s; 2 ms for the others).

    controller   : another OSC_POSE controller, in robosuite's spelling of 1.4 or of 1.5; None for RoboMimic's
    gripper_ramp : the fingers' target moves as in robosuite before 1.5, by 0.01 each 2 ms, in place of by 0.2 at the step's begin. With it, motion is
                   that of robosuite 1.4.1 to rounding errors (scripts/robomimic_study.py)
    suite        : robosuite's own environment
    terminate_on_success : the episode ends there, as an evaluation in robomimic does; else nothing terminates
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": CONTROL_HZ}

    def __init__(self, name: str, controller: Mapping | None = None, gripper_ramp: bool = True, render_mode: str | None = None, camera: str = "agentview",
                 width: int = 320, height: int = 240, terminate_on_success: bool = False):
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"render_mode {render_mode!r} is not supported; use 'rgb_array' or None")
        robots = _robots(name)
        part = controller_config(CONTROLLER if controller is None else controller)
        robosuite = _robosuite()
        from robosuite.controllers.composite.composite_controller_factory import refactor_composite_controller_config
        self.name, self.render_mode, self.terminate_on_success = name, render_mode, terminate_on_success
        self._ramp, self._view = gripper_ramp, {"camera_name": camera, "width": width, "height": height}
        self.suite = robosuite.make(
            name, robots=["Panda"] * robots, controller_configs=[refactor_composite_controller_config(part, "Panda", ["right"]) for _ in range(robots)],
            control_freq=CONTROL_HZ, lite_physics=True, hard_reset=name in DRAWN, ignore_done=True, reward_shaping=False, use_object_obs=True,
            use_camera_obs=False, has_renderer=False, has_offscreen_renderer=render_mode is not None, seed=0,
            **({"env_configuration": "opposed"} if robots > 1 else {}))
        self._observed = [f"robot{i}_{key}" for i in range(robots) for key in ROBOT_KEYS] + [key for key, _ in LAYOUTS[name].absolute]
        self._prepare()
        obs = self._observe()
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, obs.shape, np.float64)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (self.suite.action_dim,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        # robosuite's samplers share one generator, made with the environment: set anew, it makes a reset a function of the seed alone.
        self.suite.rng.bit_generator.state = np.random.default_rng(self.np_random.integers(2**63)).bit_generator.state
        self.suite.reset()
        self._prepare()
        return self._observe(), self._info()

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.suite.step(np.asarray(action, np.float64))
        mujoco.mj_fwdPosition(*self._mujoco())              # positions and contacts of the state reached; changes nothing that the next step starts from
        info = self._info()
        return self._observe(), float(info["success"]), info["success"] and self.terminate_on_success, False, info

    def reset_to(self, state: np.ndarray, model_file: str | None = None) -> np.ndarray:
        """Begin at a recorded MuJoCo state (1 + nq + nv,): time, positions, velocities. Returns the observation.

        model_file: the recorded scene. Of it only the numbers of the object in DRAWN are used (sizes, places, inertia), as nothing else differs between the
        episodes of a task: no file that it names is opened, and scenes of any robosuite version will do. Without it the object stays as it was last drawn.
        The controller starts from the robot's nominal pose, as at RoboMimic's recording.
        """
        state = np.asarray(state, np.float64)
        model = self.suite.sim.model
        if state.shape != (1 + model.nq + model.nv,) or not np.isfinite(state).all():
            raise ValueError(f"{self.name}: state must be {1 + model.nq + model.nv} finite numbers (time, {model.nq} positions, {model.nv} velocities), "
                             f"got shape {state.shape}")
        if model_file is not None and self.name in DRAWN:
            self.suite.reset_from_xml_string(_with_recorded_object(self.suite.model.get_xml(), model_file, DRAWN[self.name]))
        else:
            self.suite.deterministic_reset = True           # neither a new model nor new poses
            try:
                self.suite.reset()
            finally:
                self.suite.deterministic_reset = False
        self._prepare()
        self.suite.sim.set_state_from_flattened(state)
        self.suite.sim.forward()
        return self._observe()

    def state(self) -> np.ndarray:
        """MuJoCo's state (1 + nq + nv,), as reset_to takes it."""
        return self.suite.sim.get_state().flatten()

    def render(self) -> np.ndarray | None:
        """The scene from `camera`, (height, width, 3) uint8."""
        if self.render_mode is None:
            return None
        return self.suite.sim.render(**self._view)[::-1]    # OpenGL's first row is the lowest

    def close(self) -> None:
        self.suite.close()

    def _mujoco(self) -> tuple[mujoco.MjModel, mujoco.MjData]:
        return self.suite.sim.model._model, self.suite.sim.data._data

    def _info(self) -> dict[str, bool]:
        return {"success": bool(self.suite._check_success())}

    def _prepare(self) -> None:
        """After robosuite's own reset, which makes new controllers and may have made a new model."""
        for key in self.suite.observation_names:
            if key not in self._observed:
                self.suite.modify_observable(key, "enabled", False)
        if self._ramp:
            for robot in self.suite.robots:
                robot.gripper["right"].format_action = _finger_directions
                robot.composite_controller.part_controllers[robot.get_gripper_name("right")].interpolator = _GripperRamp()

    def _observe(self) -> np.ndarray:
        parts = self.suite._get_observations(force_update=True)
        robots = [[parts[f"robot{i}_{key}"] for key in ROBOT_KEYS] for i in range(len(self.suite.robots))]
        absolute = {key: np.reshape(parts[key], size) for key, size in LAYOUTS[self.name].absolute}
        return np.concatenate([object_vector(self.name, absolute, robots), *(value for robot in robots for value in robot)], dtype=np.float64)


class _GripperRamp:
    """Moves the fingers' target a little each 2 ms of simulation; in the place of one of robosuite's interpolators."""

    order = 1

    def __init__(self) -> None:
        self.direction = self.target = np.zeros(2)

    def set_goal(self, direction: np.ndarray) -> None:
        self.direction = direction

    def get_interpolated_goal(self) -> np.ndarray:
        self.target = np.clip(self.target + GRIPPER_STEP * self.direction, -1.0, 1.0)
        return self.target


def _finger_directions(action: np.ndarray) -> np.ndarray:
    """Where the two fingers go for a gripper action (1,): negative opens, positive closes."""
    return np.array([-1.0, 1.0]) * np.sign(action)


def _robots(name: object) -> int:
    if name not in LAYOUTS:
        raise ValueError(f"no task {name!r}; there are {', '.join(LAYOUTS)}")
    return LAYOUTS[name].robots


@functools.cache
def _robosuite() -> ModuleType:
    """robosuite, without what it logs at import and for every environment made."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        import robosuite
    except ImportError as error:
        raise ImportError(f"RoboMimic's tasks need robosuite ({error}): pip install robosuite==1.5.2") from error
    finally:
        logging.disable(before)
    if not robosuite.__version__.startswith("1.5."):
        raise ImportError(f"robosuite {robosuite.__version__} is installed; RoboMimic's tasks need 1.5: pip install robosuite==1.5.2")
    logging.getLogger("robosuite_logs").setLevel(logging.ERROR)
    return robosuite


def _with_recorded_object(scene: str, model_file: str, body: str) -> str:
    """`scene` (XML) with the sizes, places and inertia of `body` that the recorded `model_file` has; ValueError where it is not such a scene."""
    if len(model_file) > MODEL_BYTES or "<!DOCTYPE" in model_file:
        raise ValueError(f"model_file is refused: {len(model_file):,} characters, at most {MODEL_BYTES:,}, and no DOCTYPE, are read")
    try:
        recorded = _body(ET.fromstring(model_file), body)
    except ET.ParseError as error:
        raise ValueError(f"model_file is not XML ({error})") from error
    root = ET.fromstring(scene)
    ours = _body(root, body)
    if recorded is None:
        raise ValueError(f"model_file has no body {body!r} in its world: is it of another task?")
    sources = {geom.get("name"): geom for geom in recorded.findall("geom")}
    for geom in ours.findall("geom"):
        source = sources.get(geom.get("name"))
        if source is None:
            raise ValueError(f"model_file: body {body!r} has no geom {geom.get('name')!r}; it has {', '.join(map(str, sources)) or 'none'}")
        _copy_numbers(source, geom, {"size": len(geom.get("size").split()), "pos": 3})
    inertia = recorded.find("inertial")
    if inertia is not None:                                 # of files that MuJoCo 2 and before saved; later ones have densities
        for old in ours.findall("inertial"):
            ours.remove(old)
        _copy_numbers(inertia, ET.SubElement(ours, "inertial", {"pos": "0 0 0"}), {"mass": 1, "pos": 3, "quat": 4, "diaginertia": 3})
    return ET.tostring(root, encoding="unicode")


def _body(root: ET.Element, name: str) -> ET.Element | None:
    return next((body for body in root.findall("worldbody/body") if body.get("name") == name), None)


def _copy_numbers(source: ET.Element, target: ET.Element, attributes: Mapping[str, int]) -> None:
    for key, count in attributes.items():
        text = source.get(key)
        if text is None:
            continue
        try:
            numbers = [float(word) for word in text.split()]
        except ValueError:
            numbers = []
        if len(numbers) != count or not all(map(math.isfinite, numbers)):
            raise ValueError(f"model_file: {source.tag} {source.get('name')!r} has {key}={text[:80]!r}; expected {count} finite number(s)")
        target.set(key, " ".join(map(repr, numbers)))
