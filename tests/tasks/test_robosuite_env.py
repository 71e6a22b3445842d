import functools
import hashlib
import subprocess
import sys

import cloudpickle
import h5py
import mujoco
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from modip_ray.tasks import robosuite_env as module
from modip_ray.tasks.robomimic_data import read_env_args, read_robomimic
from modip_ray.tasks.robosuite_env import CONTROLLER, controller_config, env_from_metadata, env_kwargs, robosuite_env
from modip_ray.tasks.rollout import EpisodeRunner

LIFT = "lift_ph_first10_low_dim.hdf5"
SIZES = {"Lift": (19, 7), "PickPlaceCan": (23, 7), "NutAssemblySquare": (23, 7), "TwoArmTransport": (59, 14)}
OLD_CONTROLLER = {                                                      # as robomimic v0.1 and v1.4 have it
    "type": "OSC_POSE", "input_max": 1, "input_min": -1, "output_max": [0.05, 0.05, 0.05, 0.5, 0.5, 0.5], "output_min": [-0.05, -0.05, -0.05, -0.5, -0.5, -0.5],
    "kp": 150, "damping": 1, "impedance_mode": "fixed", "kp_limits": [0, 300], "damping_limits": [0, 10], "position_limits": None,
    "orientation_limits": None, "uncouple_pos_ori": True, "control_delta": True, "interpolation": None, "ramp_ratio": 0.2,
}


@pytest.fixture(scope="module")
def lift():
    env = robosuite_env("Lift")
    yield env
    env.close()


@pytest.fixture(scope="module")
def can():
    env = robosuite_env("PickPlaceCan")
    yield env
    env.close()


def episode(env, seed, steps=6):
    """Digest of an episode with actions that depend on the seed: observations, rewards and MuJoCo's states, to the bit."""
    rng = np.random.default_rng(seed)
    told = [env.reset(seed=seed)[0], env.state()]
    for _ in range(steps):
        obs, reward, *_ = env.step(rng.uniform(-1, 1, env.action_space.shape))
        told += [obs, np.array([reward]), env.state()]
    return hashlib.sha256(np.concatenate(told).tobytes()).hexdigest()


# ---- episodes --------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("task", SIZES)
def test_two_short_episodes_of_each_task(task):
    obs_dim, action_dim = SIZES[task]
    rng = np.random.default_rng(0)
    runner = EpisodeRunner(cloudpickle.loads(cloudpickle.dumps(functools.partial(robosuite_env, task))), 1, max_episode_steps=5)
    ended = []
    try:
        for number in range(2):
            runner.start(0, number, seed=number)
            while not (new := runner.step(lambda obs, slots, reset: rng.uniform(-1, 1, (1, 2, action_dim)))):
                pass
            ended += new
    finally:
        runner.close()
    assert [number for number, _ in ended] == [0, 1] and runner.env_steps == 10
    for _, e in ended:
        assert e.validate().length == 5 and not e.terminated and e.observations.shape == (6, obs_dim) and not e.rewards.any()
        assert np.ptp(e.observations[:, -9:-6], axis=0).max() > 0.005                                 # the gripper moved
    first, second = (e.observations[0] for _, e in ended)
    assert np.abs(first - second).max() > 1e-3


@pytest.mark.parametrize("name", ["lift", "can"])
def test_an_episode_depends_on_its_seed_alone(name, request):
    env = request.getfixturevalue(name)
    first = episode(env, 5)
    assert episode(env, 6) != first
    env.step(np.ones(7))
    np.random.seed(0)
    assert episode(env, 5) == first
    other = robosuite_env(env.name)
    assert episode(other, 5) == first
    other.close()


def test_an_episode_is_the_same_in_another_process(lift):
    code = (f"import sys; sys.path.insert(0, {str(sys.path[0])!r}); from modip_ray.tasks.robosuite_env import robosuite_env\n"
            "import hashlib, numpy as np\n"
            "env, rng = robosuite_env('Lift'), np.random.default_rng(5)\n"
            "told = [env.reset(seed=5)[0], env.state()]\n"
            "for _ in range(6):\n"
            "    obs, reward, *_ = env.step(rng.uniform(-1, 1, 7))\n"
            "    told += [obs, np.array([reward]), env.state()]\n"
            "print(hashlib.sha256(np.concatenate(told).tobytes()).hexdigest())")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.strip() == episode(lift, 5) and done.stderr == ""                              # and nothing is logged


def test_each_lift_has_its_own_cube(lift, can):
    def size(env, geom):
        return env.suite.sim.model.geom_size[env.suite.sim.model.geom_name2id(geom)].copy()
    cubes = []
    for seed in range(3):
        lift.reset(seed=seed)
        cubes.append(size(lift, "cube_g0"))
    assert len({tuple(c) for c in cubes}) == 3 and all((0.02 <= c).all() and (c <= 0.022).all() for c in cubes)
    model = can.suite.sim.model
    can.reset(seed=1)
    assert can.suite.sim.model is model                                                               # nothing to draw: no new model


# ---- observations ----------------------------------------------------------------------------------------------------------------------------

def test_observations_are_of_the_state_reached(can):
    """robosuite's own are some milliseconds older; and its version 1.5 gives the can relative to the gripper with the can's place one step before."""
    can.reset(seed=0)
    for _ in range(4):
        obs = can.step(np.array([1.0, -1.0, 0.5, 0.3, 0.0, -0.2, 1.0]))[0]
    model, data = can.suite.sim.model._model, mujoco.MjData(can.suite.sim.model._model)
    data.qpos[:] = can.suite.sim.data.qpos
    mujoco.mj_kinematics(model, data)
    hand, site, body = data.body("robot0_right_hand"), data.site("gripper0_right_grip_site"), data.body("Can_main")
    place, turn = (np.roll(b.xquat, -1) for b in (hand, body))                                        # to xyzw
    inverse = Rotation.from_quat(place).inv()
    relative = (inverse * Rotation.from_quat(turn)).as_quat()
    fingers = [data.joint(f"gripper0_right_finger_joint{i}").qpos for i in (1, 2)]
    expected = np.concatenate([body.xpos, turn, inverse.apply(body.xpos - site.xpos), relative * np.sign(relative[3]), site.xpos, place, *fingers])
    np.testing.assert_allclose(obs, expected, atol=1e-6)


def test_reading_positions_does_not_touch_the_motion(can):
    """The same actions given to robosuite itself."""
    can.reset(seed=3)
    start, rng = can.state(), np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (8, 7))
    can.reset_to(start)
    ours = [(can.step(a), can.state())[1] for a in actions]
    can.reset_to(start)
    theirs = [(can.suite.step(a), can.state())[1] for a in actions]
    assert np.array_equal(ours, theirs)


def test_success_pays_one_and_ends_nothing(lift):
    lift.reset(seed=0)
    state = lift.state()
    assert lift.step(np.zeros(7))[1] == 0.0
    state[1 + 11] = 1.2                                                 # the cube's height: above the table by 0.4 m
    obs = lift.reset_to(state)
    assert obs[2] == pytest.approx(1.2)
    obs, reward, terminated, truncated, info = lift.step(np.zeros(7))
    assert (reward, terminated, truncated, info) == (1.0, False, False, {"success": True}) and 1.1 < obs[2] < 1.2


@pytest.mark.parametrize(("ramp", "targets"), [(True, [0.25, 0.5, 0.75, 1.0, 1.0]), (False, [0.2, 0.4, 0.6, 0.8, 1.0])])
def test_the_fingers_target_moves_as_before_robosuite_15(ramp, targets, can):
    env = can if ramp else robosuite_env("PickPlaceCan", gripper_ramp=False)
    env.reset(seed=0)
    model, reached = env.suite.sim.model._model, []
    finger = model.actuator("gripper0_right_gripper_finger_joint2").id
    low, high = model.actuator_ctrlrange[finger]
    for _ in targets:
        env.step(np.array([0, 0, 0, 0, 0, 0, 1.0]))
        reached.append((env.suite.sim.data.ctrl[finger] - (low + high) / 2) / ((high - low) / 2))
    np.testing.assert_allclose(reached, targets, atol=1e-9)
    env.step(np.zeros(7))
    assert (env.suite.sim.data.ctrl[finger] - low) / (high - low) == pytest.approx(1.0)               # 0: the fingers stay where they are


# ---- recorded states -------------------------------------------------------------------------------------------------------------------------

def test_official_demonstrations_replay(data_file):
    """Recorded with robosuite before 1.2 and MuJoCo 2.0. The whole file: scripts/robomimic_study.py replay."""
    path = data_file(LIFT)
    dataset = read_robomimic(path, max_transitions=120)
    env = env_from_metadata(read_env_args(path))
    with h5py.File(path) as file:
        for name, recorded in zip(("demo_0", "demo_1"), dataset.episodes, strict=False):
            env.terminate_on_success = name == "demo_1"
            demo = file["data"][name]
            states, actions = demo["states"][()], demo["actions"][()]
            obs = [env.reset_to(states[0], demo.attrs["model_file"])]
            rewards = []
            for t, action in enumerate(actions):
                after, reward, terminated, *_ = env.step(action)
                obs.append(after)
                rewards.append(reward)
                assert terminated == (env.terminate_on_success and reward == 1)
                if t + 1 < len(states):
                    assert np.abs(env.state() - states[t + 1])[:17].max() < 1e-3, f"{name}, step {t}"   # time and positions
            assert rewards == recorded.rewards.tolist() and rewards[-1] == 1.0
            np.testing.assert_allclose(obs[:-1], recorded.observations[:-1], atol=1e-3)
    env.close()


def test_of_a_recorded_scene_only_numbers_are_used(lift):
    lift.reset(seed=0)
    state, text = lift.state(), lift.suite.model.get_xml()
    size = text.split('name="cube_g0"')[0].rsplit('size="', 1)[1].split('"')[0]
    foreign = text.replace(size, "0.03 0.025 0.02").replace(".png", ".png.gone").replace("<worldbody>", '<include file="/etc/passwd" /><worldbody>')
    assert foreign.count("0.03 0.025 0.02") == 2 and "/etc/passwd" in foreign
    obs = lift.reset_to(state, foreign)
    model = lift.suite.sim.model
    assert model.geom_size[model.geom_name2id("cube_g0")].tolist() == [0.03, 0.025, 0.02] and np.isfinite(obs).all()
    lift.reset(seed=0)                                                  # the seed's own cube again
    assert lift.suite.sim.model.geom_size[lift.suite.sim.model.geom_name2id("cube_g0")].tolist() == pytest.approx([float(x) for x in size.split()])


@pytest.mark.parametrize(("old", "new", "words"), [
    ("<mujoco", '<!DOCTYPE x [<!ENTITY a "b">]><mujoco', "no DOCTYPE"),
    ("<mujoco", "<mujoco <", "not XML"),
    ("cube_main", "other", "no body 'cube_main'"),
    ("cube_g0", "other", "has no geom 'cube_g0"),
    ('name="cube_g0" size="0.0', 'name="cube_g0" size="nan 0.0', "size=.*expected 3 finite"),
])
def test_a_bad_scene_is_refused(lift, old, new, words):
    lift.reset(seed=0)
    cube = '<body name="cube_main"><geom name="cube_g0" size="0.02 0.02 0.02" /><geom name="cube_g0_vis" size="0.02 0.02 0.02" /></body>'
    text = f"<mujoco><worldbody>{cube}</worldbody></mujoco>"
    assert lift.reset_to(lift.state(), text).shape == (19,)
    assert old in text
    with pytest.raises(ValueError, match=words):
        lift.reset_to(lift.state(), text.replace(old, new))


def test_a_state_of_a_wrong_shape_is_refused(lift):
    with pytest.raises(ValueError, match=r"Lift: state must be 32 finite numbers .*got shape \(31,\)"):
        lift.reset_to(np.zeros(31))
    with pytest.raises(ValueError, match="32 finite numbers"):
        lift.reset_to(np.full(32, np.nan))


# ---- descriptions ----------------------------------------------------------------------------------------------------------------------------

def described(name="Lift", version=None, controller=OLD_CONTROLLER, **kwargs):
    given = {"robots": ["Panda"], "controller_configs": controller, "control_freq": 20, "camera_names": ["a"], **kwargs}
    return {"env_name": name, "type": 1, "env_kwargs": given, **({"env_version": version} if version else {})}


def test_descriptions_of_all_versions():
    new = {"type": "BASIC", "body_parts": {"right": {**CONTROLLER, "kp": 100, "gripper": {"type": "GRIP"}}}}
    assert env_kwargs(described()) == {"name": "Lift", "controller": CONTROLLER, "gripper_ramp": True}                              # v0.1
    assert env_kwargs(described("PickPlaceCan", "1.4.1")) == {"name": "PickPlaceCan", "controller": CONTROLLER, "gripper_ramp": True}
    for ramp in (True, False):
        assert env_kwargs(described(version="1.5.1", controller=new), ramp) == {"name": "Lift", "controller": {**CONTROLLER, "kp": 100}, "gripper_ramp": ramp}
    with pytest.raises(ValueError, match="of robosuite 1.5.1, which does not tell the gripper; give gripper_ramp=False for .*, or True for"):
        env_kwargs(described(version="1.5.1", controller=new))
    official = {**OLD_CONTROLLER, "input_ref_frame": "world", "gripper": {"type": "GRIP"}}           # as robomimic's own files of 1.5 have it
    assert controller_config({"type": "BASIC", "body_parts": {"right": official}}) == CONTROLLER
    assert controller_config({"body_parts": {"arms": {"right": OLD_CONTROLLER}}}) == {**CONTROLLER, "input_ref_frame": "base"}    # robosuite 1.5's own
    two = described("TwoArmTransport", "1.4.1", [OLD_CONTROLLER] * 2, robots=["Panda", "Panda"], env_configuration="single-arm-opposed")
    assert env_kwargs(two)["name"] == "TwoArmTransport"
    assert controller_config({**OLD_CONTROLLER, "damping": 2})["damping_ratio"] == 2


@pytest.mark.parametrize(("args", "words"), [
    ("{", "not robomimic's description"), ({"env_name": "Lift"}, "KeyError: 'env_kwargs'"), ([1], "TypeError"),
    (described("Door"), "no task 'Door'; there are Lift"), (described(robots=["Sawyer"]), "robots is .*Sawyer.*only .'Panda'. is supported"),
    (described("TwoArmTransport"), "robots is .'Panda'.; only .'Panda', 'Panda'."), (described(control_freq=10), "control_freq is 10; only 20"),
    (described(reward_shaping=True), "reward_shaping is True"), ({**described(), "type": 2}, "type is 2; only 1"),
    (described(env_configuration="parallel"), "env_configuration is 'parallel'"),
    (described(controller=[OLD_CONTROLLER, {**OLD_CONTROLLER, "kp": 1}]), "differ between the robots"),
    (described(controller={**OLD_CONTROLLER, "type": "JOINT_VELOCITY"}), "type is 'JOINT_VELOCITY'; only 'OSC_POSE'"),
    (described(controller={**OLD_CONTROLLER, "control_delta": False}), "input_type is 'absolute'; only 'delta'"),
    (described(controller={**OLD_CONTROLLER, "gain": 1}), "controller: gain unknown"), (described(controller="OSC_POSE"), "controller is 'OSC_POSE'"),
])
def test_descriptions_that_are_refused(args, words):
    with pytest.raises(ValueError, match=words):
        env_kwargs(args)


def test_wrong_arguments_and_a_missing_robosuite(monkeypatch):
    with pytest.raises(ValueError, match="no task 'Stack'; there are Lift, PickPlaceCan"):
        robosuite_env("Stack")
    with pytest.raises(ValueError, match="render_mode 'human' is not supported"):
        robosuite_env("Lift", render_mode="human")
    monkeypatch.setitem(sys.modules, "robosuite", None)
    module._robosuite.cache_clear()
    with pytest.raises(ImportError, match="pip install robosuite==1.5.2"):
        robosuite_env("Lift")
    module._robosuite.cache_clear()


def test_rendering():
    env = None
    try:
        env = robosuite_env("PickPlaceCan", render_mode="rgb_array", width=96, height=64)
        env.reset(seed=0)
        picture = env.render()
    except (RuntimeError, AttributeError, ImportError) as error:
        pytest.skip(f"no OpenGL here: {type(error).__name__}: {error}")
    finally:
        if env is not None:
            env.close()
    assert picture.shape == (64, 96, 3) and picture.dtype == np.uint8 and picture.std() > 5
