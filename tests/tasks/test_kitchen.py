import collections
import collections.abc
import hashlib
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import cloudpickle
import mujoco
import numpy as np
import pytest

from modip_ray.tasks.d4rl_data import read_d4rl
from modip_ray.tasks.kitchen import COMPLETE, JOINTS, MIXED, POSITIONS, START, kitchen_env, newly_done

FILE = "mini_kitchen_microwave_kettle_light_slider-v0.hdf5"
DEMOS = (0, 13)                     # of the official file, replayed


def actions_of(seed, steps):
    return np.random.default_rng(seed).uniform(-1, 1, (steps, JOINTS)).astype(np.float32)


def rollout(env, seed, actions):
    """Observations (T+1, 60) and rewards (T,)."""
    observations, rewards = [env.reset(seed=seed)[0]], []
    for action in actions:
        obs, reward, *_ = env.step(action)
        observations.append(obs)
        rewards.append(reward)
    return np.array(observations), np.array(rewards)


# ---- against D4RL's own environment ----------------------------------------------------------------------------------------------------------

@pytest.fixture
def d4rl_kitchen(tmp_path, monkeypatch):
    """Makes D4RL's own environment; its files are linked to, but for one XML that MuJoCo 3 no longer reads as it is."""
    monkeypatch.setitem(sys.modules, "mujoco_py", None)
    monkeypatch.setattr(collections, "Mapping", collections.abc.Mapping, raising=False)     # gone since Python 3.10
    from d4rl.kitchen import kitchen_envs
    folder = tmp_path / "kitchen"
    shutil.copytree(Path(kitchen_envs.__file__).parent, folder, copy_function=os.symlink, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    kettle = folder / "adept_models/kitchen/assets/kettle_asset.xml"
    text = kettle.read_text()
    kettle.unlink()
    kettle.write_text(text.replace('<default class="kettle">', '<default><default class="kettle">').replace("</mujocoinclude>", "</default></mujocoinclude>"))

    def make(name):
        theirs = getattr(kitchen_envs, name)
        return type(name, (theirs,), {"MODEl": str(folder / "adept_envs/franka/assets/franka_kitchen_jntpos_act_ab.xml")})()
    return make


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "tasks"), [("KitchenMicrowaveKettleLightSliderV0", COMPLETE), ("KitchenMicrowaveKettleBottomBurnerLightV0", MIXED)])
def test_equals_d4rl_bit_for_bit(d4rl_kitchen, name, tasks):
    """Observations with noise, rewards and terminations, also when objects are put at their goals."""
    theirs, ours = d4rl_kitchen(name), kitchen_env(tasks)
    theirs.reset()
    theirs.np_random = np.random.default_rng(7)                     # as gymnasium seeds: the same stream
    theirs._get_obs()                                               # the observation after the reset, which the first action starts from
    obs, _ = ours.reset(seed=7)
    assert (theirs.obs_dict["qp"] == obs[:JOINTS]).all() and (theirs.goal == obs[POSITIONS:]).all()
    rewards = []
    for step, action in enumerate(actions_of(0, 80)):
        if step % 20 == 10:                                         # the next subtask is done by hand
            task = tasks[step // 20]
            for data in (theirs.sim.data, ours.data):
                data.qpos[ours.columns[task]] = ours.goal[ours.columns[task]]
            theirs.sim.forward()
        expected, reward, done, _ = theirs.step(1.5 * action)       # clipped
        obs, *got, info = ours.step(1.5 * action)
        assert (obs == expected).all() and got == [reward, done, False] and len(info["done"]) == reward
        rewards.append(reward)
        if done:
            break
    assert sum(rewards) == 4 and done and step < 79


# ---- by itself -------------------------------------------------------------------------------------------------------------------------------

def test_seeds_reproduce_in_a_fresh_process():
    code = ("import numpy as np, hashlib; from tests.tasks.test_kitchen import *; "
            "print(hashlib.sha256(rollout(kitchen_env(), 3, actions_of(1, 40))[0].tobytes()).hexdigest())")
    root = Path(__file__).resolve().parents[2]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True, check=True)
    env = cloudpickle.loads(cloudpickle.dumps(partial(kitchen_env, tasks=COMPLETE)))()
    other = rollout(env, 4, actions_of(2, 25))[0]
    again = rollout(env, 3, actions_of(1, 40))[0]                   # after another episode
    assert hashlib.sha256(again.tobytes()).hexdigest() == run.stdout.strip()
    assert not (other[0] == again[0]).all() and (rollout(env, 4, actions_of(2, 25))[0] == other).all()
    assert again.shape == (41, 60) and env.observation_space.contains(again[0]) and env.action_space.shape == (9,)


def test_pictures_do_not_change_the_motion():
    """The model that is rendered and the smaller one that is not move alike; two kitchens of a process share one model."""
    plain, seen = kitchen_env(noise=False), kitchen_env(noise=False, render_mode="rgb_array")
    assert plain.model.ngeom < seen.model.ngeom and plain.model is kitchen_env().model
    assert (rollout(plain, 0, actions_of(3, 40))[0] == rollout(seen, 0, actions_of(3, 40))[0]).all()
    assert plain.render() is None


def test_without_noise_the_observation_is_the_position():
    env = kitchen_env(noise=False)
    assert (env.reset(seed=0)[0][:POSITIONS] == START).all()
    obs = env.step(np.zeros(JOINTS, np.float32))[0]
    assert (obs[:POSITIONS] == env.data.qpos).all() and (obs[POSITIONS:] == env.goal).all()


@pytest.mark.parametrize(("kwargs", "words"), [
    ({"tasks": ("toaster",)}, "tasks must be a list of different subtasks out of .*microwave.*got .*toaster"),
    ({"tasks": ()}, "tasks must be"), ({"tasks": "kettle"}, "tasks must be"), ({"tasks": ("kettle", "kettle")}, "tasks must be"),
    ({"render_mode": "human"}, "render_mode 'human' is not supported; use 'rgb_array'"),
])
def test_wrong_arguments_are_named(kwargs, words):
    with pytest.raises(ValueError, match=words):
        kitchen_env(**kwargs)


@pytest.mark.parametrize(("counts", "expected"), [
    ([0, 0, 1, 1, 2, 2], [0, 1, 0, 1, 0, 0]),
    ([0, 1, 0, 1, 2, 1], [1, 0, 0, 1, 0, 0]),                       # undone and done again: once
    ([0, 3, 4], [3, 1, 0]), ([1, 1], [1, 0]), ([0], [0]), ([2], [0]),
])
def test_newly_done(counts, expected):
    found = newly_done(np.array(counts, np.float32))
    assert found.tolist() == expected and found.dtype == np.float32 and found.sum() == max(counts[1:], default=0)


@pytest.mark.parametrize(("counts", "words"), [([0, 0.5], r"rewards\[1\] is 0.5"), ([0, -1], r"rewards\[1\] is -1"), ([], "shape"), ([[1]], "shape"),
                                               ([0, np.nan], r"rewards\[1\] is nan")])
def test_newly_done_refuses_what_are_no_counts(counts, words):
    with pytest.raises(ValueError, match=words):
        newly_done(np.array(counts, np.float32))


# ---- against the official file ---------------------------------------------------------------------------------------------------------------

@pytest.fixture
def demos(data_file):
    """(observed positions (T, 30), actions (T, 9), file's rewards (T,)) of each demonstration."""
    return [(e.observations[:-1, :POSITIONS].astype(float), e.actions, e.rewards) for e in read_d4rl(data_file(FILE)).episodes]


def replayed(env, observed, actions):
    """Positions (T, 30) at the record's rows, and our rewards (T-1,), when each action starts from the RECORDED observation, as it did."""
    env.reset(seed=0)
    env.data.qpos[:] = observed[0]
    mujoco.mj_forward(env.model, env.data)
    positions, rewards = [observed[0]], []
    for row in range(len(actions) - 1):
        env.observed = observed[row]
        rewards.append(env.step(actions[row])[1])
        positions.append(env.data.qpos.copy())
    return np.array(positions), np.array(rewards)


def test_recorded_demonstrations_succeed_and_noise_is_the_files(demos):
    still, noisy = kitchen_env(noise=False), kitchen_env()
    squares, count = np.zeros(POSITIONS), np.zeros(POSITIONS)
    for number in DEMOS:
        observed, actions, counts = demos[number]
        positions, rewards = replayed(still, observed, actions)
        assert (rewards == newly_done(counts)[:-1]).all() and rewards.sum() == 4                # every subtask at the very step it was done in the record
        assert (np.abs(positions - observed)[:, :JOINTS] < 2 * still.sensor_noise[:JOINTS]).all()
        usable = np.abs(np.diff(positions, axis=0)) < 0.1 * still.sensor_noise                  # where an object moves, the replay's error would count too
        usable[:, :JOINTS] = True
        squares += (np.diff(observed - positions, axis=0) ** 2 * usable).sum(0)
        count += usable.sum(0)
    theirs = np.sqrt(squares / count / 2)
    ours = np.array([noisy.reset(seed=s)[0][:POSITIONS] - START for s in range(600)])
    ratio = ours.std(0) / theirs
    assert (count > 200).all() and ratio.shape == (30,) and (ratio > 0.88).all() and (ratio < 1.12).all(), ratio.round(2)
    assert (np.abs(ours) <= noisy.sensor_noise).all()


def test_start_state_is_the_files(demos):
    starts = np.array([observed[0] for observed, _, _ in demos])                                # (19, 30)
    env = kitchen_env()
    ours = np.array([env.reset(seed=s)[0][:POSITIONS] for s in range(300)])
    objects = slice(JOINTS, POSITIONS)
    assert (np.abs(starts.mean(0) - START) < 1.1 * env.sensor_noise)[objects].all()             # START is itself one noisy observation
    ratio = (starts.std(0) / ours.std(0))[objects]
    assert (ratio > 0.6).all() and (ratio < 1.5).all(), ratio.round(2)
    assert (np.abs(START[:JOINTS] - starts.mean(0)[:JOINTS]) < 2.5 * starts.std(0)[:JOINTS]).all()   # people began in other poses; D4RL's start is a fixed one
