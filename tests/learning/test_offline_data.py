"""Which data a run learns from, and what is refused."""
import json
import os
import re
import shutil
from contextlib import nullcontext
from pathlib import Path

import gymnasium as gym
import h5py
import numpy as np
import pytest

from modip_ray.config import ConfigError, load
from modip_ray.learning import offline_data
from modip_ray.learning.env_source import check_family, env_factory
from modip_ray.learning.offline_data import check_task, family_named, load_data, origin, source_label, stored_source, with_newly_done
from modip_ray.tasks.d4rl_data import DataError, write_d4rl
from modip_ray.tasks.dataset import Dataset
from modip_ray.tasks.episode import Episode
from tests.fakes import PointEnv, small


def written(path, rewards):
    n = len(rewards)
    write_d4rl(path, [Episode(np.zeros((n + 1, 4), np.float32), np.zeros((n, 2), np.float32), np.float32(rewards), False)], {})
    return path


def test_kitchen_rewards_are_paid_once(tmp_path):
    data = written(tmp_path / "k.hdf5", [0, 0, 1, 1, 0, 2, 2])
    stored = load_data(small(data=data), PointEnv, tmp_path)
    paid = load_data(small(data=data, data__rewards="newly_done"), PointEnv, tmp_path)
    assert stored.episodes[0].rewards.tolist() == [0, 0, 1, 1, 0, 2, 2]
    assert paid.episodes[0].rewards.tolist() == [0, 1, 0, 0, 1, 0, 0] and "newly done" in paid.notes[-1]


def test_kitchen_episodes_that_leave_subtasks_undone_are_cut():
    def episode(rewards, repeated=True):
        n = len(rewards)
        obs = np.arange(4 * n + 4, dtype=np.float32).reshape(-1, 4)
        return Episode(np.concatenate([obs[:-1], obs[-2 if repeated else -1:][:1]]), np.zeros((n, 2), np.float32), np.float32(rewards), True)
    read = Dataset([episode([0, 1, 1, 2, 2, 2]), episode([0, 1, 1, 1]), episode([0, 1, 1], repeated=False), episode([0])], "k.hdf5")
    done, part, known = with_newly_done(read, 2).episodes                       # the last one had a single step, to nowhere
    assert done.rewards.tolist() == [1, 0, 1, 0, 0, 0] and done.terminated
    assert part.rewards.tolist() == [1, 0, 0] and not part.terminated and (part.observations == np.arange(16).reshape(4, 4)).all()
    assert known.rewards.tolist() == [1, 0, 0] and not known.terminated and len(known.observations) == 4
    assert "3 of 4 episodes leave subtasks undone" in with_newly_done(read, 2).notes[-1]
    assert [e.terminated for e in with_newly_done(read).episodes] == 4 * [True]                 # an environment that does not say how many there are
    with pytest.raises(DataError, match="k.hdf5: no episode has a step"):
        with_newly_done(Dataset([episode([0])], "k.hdf5"), 2)


def test_rewards_that_are_no_counts_are_refused(tmp_path):
    data = written(tmp_path / "k.hdf5", [0, 0.5, 1])
    with pytest.raises(DataError, match="k.hdf5: data.rewards is newly_done.*0.5"):
        load_data(small(data=data, data__rewards="newly_done"), PointEnv, tmp_path)


@pytest.mark.parametrize(("settings", "words"), [
    ({"data__source": "d4rl/hoper_medium-v2"}, "d4rl/hopper_medium-v2"), ({"data__source": "nowhere.hdf5"}, "nowhere.hdf5: no such file"),
    ({"data__filter_key": "train"}, "only robomimic files"), ({"task__env": "Pendulum-v1"}, "observations have 4 columns, but Pendulum-v1 has 3"),
])
def test_what_does_not_fit_is_named(tmp_path, settings, words):
    cfg = small(data=written(tmp_path / "k.hdf5", [0, 1, 2])).replace({k.replace("__", "."): v for k, v in settings.items()})
    with pytest.raises(DataError, match=words):
        load_data(cfg, env_factory(cfg.task), tmp_path)


def test_labels():
    assert source_label(small(data__source="demonstrator")) == "demonstrator data"
    assert source_label(small(data__source="policy:x.hdf5")) == "data of policy:x.hdf5"


def test_episodes_end_at_their_success(tmp_path):
    data = tmp_path / "s.hdf5"
    write_d4rl(data, [Episode(np.arange(4 * n + 4, dtype=np.float32).reshape(-1, 4), np.zeros((n, 2), np.float32), np.float32(rewards), False)
                      for rewards in ([0, 0, 1, 1, 0], [0, 0.5, 0]) if (n := len(rewards))], {})
    solved, failed = load_data(small(data=data, data__rewards="until_success"), PointEnv, tmp_path).episodes
    assert solved.rewards.tolist() == [0, 0, 1] and solved.terminated and solved.actions.shape == (3, 2)
    assert solved.observations[:, 0].tolist() == [0, 4, 8, 12] and failed.rewards.tolist() == [0, 0.5, 0] and not failed.terminated

def test_a_success_at_the_last_row_is_not_lost_where_next_observations_are_missing(tmp_path):
    with h5py.File(tmp_path / "s.hdf5", "w") as f:
        f["observations"], f["actions"] = np.arange(16.0).reshape(4, 4), np.zeros((4, 2))
        f["rewards"], f["terminals"], f["timeouts"] = np.float64([0, 1, 0, 0]), np.zeros(4, bool), np.array([0, 1, 0, 1], bool)
    data = load_data(small(data=tmp_path / "s.hdf5", data__rewards="until_success"), PointEnv, tmp_path)
    solved, failed = data.episodes
    assert solved.rewards.tolist() == [0, 1] and solved.terminated and (solved.observations[2] == solved.observations[1]).all()
    assert failed.length == 1 and not failed.terminated and "1 terminated or solved episode(s) repeats" in data.notes[1]
    assert [e.length for e in load_data(small(data=tmp_path / "s.hdf5"), PointEnv, tmp_path).episodes] == [1, 1]


@pytest.mark.parametrize("next_obs", [True, False])
def test_robomimic_without_next_obs_keeps_its_successes(tmp_path, next_obs):
    data = Path(os.environ.get("MODIP_TEST_DATA", "")) / "lift_ph_first10_low_dim.hdf5"
    if not data.is_file():
        pytest.skip("real data: set MODIP_TEST_DATA to a folder with the Lift file")
    path = tmp_path / "lift.hdf5"
    shutil.copyfile(data, path)
    with h5py.File(path, "r+") as file:
        for demo in file["data"].values():
            demo["rewards"][:] = np.arange(len(demo["rewards"])) == len(demo["rewards"]) - 1
            if not next_obs:
                del demo["next_obs"]
    cfg = small(data=path, data__rewards="until_success")
    lift = Sized(19, 7)
    episodes = load_data(cfg, lambda: lift, tmp_path).episodes
    assert len(episodes) == 10 and sum(e.length for e in episodes) == 531 and all(e.terminated and e.rewards[-1] == 1 for e in episodes)


class Sized(PointEnv):
    """PointEnv with other sizes."""

    def __init__(self, obs_dim, action_dim):
        self.observation_space, self.action_space = gym.spaces.Box(-1, 1, (obs_dim,)), gym.spaces.Box(-1, 1, (action_dim,))

    def reset(self, *, seed=None, options=None):
        return np.zeros(self.observation_space.shape, np.float32), {}

    def step(self, action):
        return self.reset()[0], 0.0, False, False, {}


# ---- collected data --------------------------------------------------------------------------------------------------------------------------

def demo(tmp_path, **settings):
    """HalfCheetah's demonstrator, a few steps of it."""
    few = {"data.transitions": 8, "task.max_episode_steps": 4, "data.cache": str(tmp_path / "kept.hdf5")}
    return load().replace(few | {k.replace("__", "."): v for k, v in settings.items()})


def collected(cfg, folder):
    return load_data(cfg, env_factory(cfg.task), folder)


@pytest.mark.parametrize(("settings", "words"), [
    ({"task__env_kwargs": {"reset_noise_scale": 0.0}}, r"env_kwargs='{}', this run asks for '{\"reset_noise_scale\": 0.0}'"),
    ({"task__max_episode_steps": 5}, "max_episode_steps=4, this run asks for 5"), ({"data__transitions": 9}, "transitions_asked=8, this run asks for 9"),
])
def test_kept_data_of_other_settings_are_refused(tmp_path, settings, words):
    first = collected(demo(tmp_path), tmp_path)
    assert collected(demo(tmp_path, seed=1), tmp_path).transitions == first.transitions == 8
    with pytest.raises(DataError, match=f"kept.hdf5: was collected with {words}; delete the file"):
        collected(demo(tmp_path, **settings), tmp_path)


def test_home_is_the_same_everywhere(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    first = collected(demo(tmp_path, data__cache="~/kept.hdf5"), tmp_path)
    assert (tmp_path / "kept.hdf5").is_file() and not (tmp_path / "~").exists()
    assert stored_source(demo(tmp_path, data__cache="~/x"), tmp_path) == f"{tmp_path}/x"
    assert origin(demo(tmp_path, data__source="policy:./x"))["source"] == "policy:./x"
    again = {"data__source": "policy:~/kept.hdf5", "data__cache": "~/again.hdf5"}                # what was collected holds the policy
    assert collected(demo(tmp_path, **again), tmp_path).transitions == first.transitions
    assert collected(demo(tmp_path, **again | {"data__source": f"policy:{tmp_path}/kept.hdf5"}), tmp_path).transitions == first.transitions


def test_a_policy_that_does_not_fit_is_told_before_anything_is_collected(tmp_path, monkeypatch):
    kept = tmp_path / "halfcheetah_medium-v2.hdf5"
    collected(demo(tmp_path, data__cache=str(kept)), tmp_path)
    monkeypatch.setattr(offline_data, "collect", lambda *a, **k: pytest.fail("nothing is to be collected"))
    policy = {"data__source": f"policy:{kept}"}
    for settings, words in (({**policy, "task__env": "Hopper-v4"}, "policy is for observations of 17 numbers, but Hopper-v4 has 11; give data.source"),
                            ({**policy, "task__env": "tests.learning.test_offline_data:Arms"}, "for actions of 6 numbers, but .*Arms has 7"),
                            ({**policy, "task__env": "Walker2d-v4"}, "the policy is of halfcheetah, but the task is of walker2d"),
                            ({"task__env": "Walker2d-v4"}, "demonstrator: the policy is of halfcheetah, but the task is of walker2d"),
                            ({"data__filter_key": "train"}, "data.filter_key is 'train'.*data.source=demonstrator collects data; set data.filter_key=null")):
        with pytest.raises(DataError, match=words):
            collected(demo(tmp_path, **settings), tmp_path)


class Arms(Sized):
    def __init__(self):
        super().__init__(17, 7)


def test_kept_data_of_before_are_used(tmp_path):
    collected(demo(tmp_path), tmp_path)
    with h5py.File(tmp_path / "kept.hdf5", "r+") as file:
        del file["metadata/env_kwargs"], file["metadata/max_episode_steps"]
    assert collected(demo(tmp_path, task__max_episode_steps=5), tmp_path).transitions == 8


# ---- data of another task --------------------------------------------------------------------------------------------------------------------

def zeros(path, obs_dim=17, action_dim=6, **metadata):
    write_d4rl(path, [Episode(np.zeros((4, obs_dim), np.float32), np.zeros((3, action_dim), np.float32), np.zeros(3, np.float32), False)], metadata)
    return path


def read(path, task, **settings):
    cfg = load(overrides=[f"task={task}"]).replace({"data.source": str(path)} | {k.replace("__", "."): v for k, v in settings.items()})
    return load_data(cfg, env_factory(cfg.task), path.parent)


@pytest.mark.parametrize(("name", "metadata"), [
    ("my.hdf5", {"env": "HalfCheetah-v4"}), ("my.hdf5", {"minari_id": "mujoco/halfcheetah/medium-v0"}),
    ("my.hdf5", {"converted_from": "d4rl/halfcheetah_medium-v2"}),
    ("halfcheetah_medium-v2.hdf5", {}), ("halfcheetah_medium_replay-v2.head.hdf5", {}),
])
def test_another_environment_of_the_same_sizes_is_refused(tmp_path, name, metadata):
    path = zeros(tmp_path / name, **metadata)
    assert read(path, "halfcheetah-medium").transitions == 3
    with pytest.raises(DataError, match=f"{name}: .* is data of halfcheetah, but the task is of walker2d .task.env='Walker2d-v4'"):
        read(path, "walker2d-medium")


def test_own_data_and_own_environments_go_on_working(tmp_path):
    for path in (zeros(tmp_path / "my.hdf5"), zeros(tmp_path / "my-halfcheetah.hdf5", env="mine:Cheetah", source="my robot")):
        assert read(path, "walker2d-medium").transitions == 3                                   # nothing tells what they are of
    known = zeros(tmp_path / "known.hdf5", 4, 2, env="HalfCheetah-v4")
    assert load_data(small(data=known), PointEnv, tmp_path).transitions == 3                    # nor is the environment known
    own = Dataset([], "own", {"env_name": "PickPlaceCan"})
    check_task(small(task__env_kwargs={"name": "point"}), own)                                  # its `name` is no task of robosuite
    old = load(overrides=["task.env=modip_ray.tasks.d4rl_physics:d4rl_env", "task.env_kwargs={env_id: Hopper-v4}"])
    check_task(old.replace({"data.source": "d4rl/hopper_medium-v2"}), Dataset([], "own"))
    with pytest.raises(DataError, match="'d4rl/walker2d_medium-v2' is data of walker2d, but the task is of hopper"):
        check_task(old.replace({"data.source": "d4rl/walker2d_medium-v2"}), Dataset([], "own"))


@pytest.mark.parametrize(("overrides", "words"), [
    (["task=hopper-medium", "task.env=Walker2d-v4"], "got 'hopper', but 'Walker2d-v4' is of walker2d.*set task.family=walker2d, or task.family=null"),
    (["task=hopper-medium", "task.env=Walker2d-v4", "task.family=null"], None), (["task=hopper-medium", "task.env=Walker2d-v4", "task.family=walker2d"], None),
    (["task=hopper-medium", f"task.env={offline_data.ROBOSUITE}robosuite_env"], None), (["task=hopper-medium", "task.env=mine:Hopper"], None),
    (["task=hopper-medium", "task.env=modip_ray.tasks.d4rl_physics:d4rl_env"], None), (["task=walker2d-medium", "task.env_kwargs.env_id=Hopper-v4"], None),
    (["task=walker2d-medium", "task.env=modip_ray.tasks.d4rl_physics:d4rl_env"], "'Hopper-v4' is of hopper"), (["task.family=cheetah"], "mean 'halfcheetah'"),
])
def test_scores_are_normalised_by_the_environments_own_family(overrides, words):
    with nullcontext() if words is None else pytest.raises(ConfigError, match=f"task.family: .*{words}"):
        check_family(load(overrides=overrides).task)


def test_an_environment_that_is_no_gymnasium_class(tmp_path):
    class Plain:
        observation_space, action_space, reset, step = PointEnv.observation_space, PointEnv.action_space, Sized.reset, Sized.step

        def close(self):
            pass
    assert load_data(small(data=zeros(tmp_path / "my.hdf5", 4, 2)), Plain, tmp_path).transitions == 3


def test_names_that_tell_a_family():
    told = {"d4rl/hopper_medium-v2": "hopper", "/x/hopper_medium-v2.hdf5": "hopper", "d4rl/kitchen_mixed-v0": "kitchen",
            "minari:mujoco/walker2d/expert-v0": "walker2d", "/x/mini_kitchen_microwave_kettle_light_slider-v0.hdf5": "kitchen",
            "/x/hopper.hdf5": None, "robomimic/can_ph": None, "/x/low_dim.hdf5": None, "minari:mine/hopper/x-v0": None, "minari:hopper-v0": None}
    assert {name: family_named(name) for name in told} == told


def test_another_task_of_robomimic_is_refused():
    square = load(overrides=["task=square-ph"])
    check_task(square, Dataset([], "square.hdf5", {"env_name": "NutAssemblySquare"}))
    check_task(square, Dataset([], "square_d0.hdf5", {"env_name": "Square_D0"}))                # of a variant that we do not know
    with pytest.raises(DataError, match="low_dim.hdf5: holds demonstrations of PickPlaceCan, but task.env_kwargs.name is 'NutAssemblySquare'"):
        check_task(square, Dataset([], "low_dim.hdf5", {"env_name": "PickPlaceCan"}))


@pytest.mark.parametrize(("version", "kwargs", "refused"), [
    ("1.5.1", {}, True), ("1.5.1", {"gripper_ramp": False}, False), ("1.5.1", {"gripper_ramp": True}, False), ("1.4.1", {}, False),
    ("not stated (robomimic v0.1)", {}, False),
])
def test_data_of_robosuite_15_must_be_told_which_gripper_moves(version, kwargs, refused):
    cfg = load(overrides=["task=lift-ph"])
    cfg = cfg.replace({"task.env_kwargs": {**cfg.task.env_kwargs, **kwargs}})
    data = Dataset([], "low_dim_v15.hdf5", {"env_name": "Lift", "robosuite": version})
    if not refused:
        return check_task(cfg, data)
    with pytest.raises(DataError, match=r"is of robosuite 1.5.1.*task.env_kwargs='(.*)' for robosuite 1.5's") as error:
        check_task(cfg, data)
    given = re.search(r"task.env_kwargs='(.*?)' for", str(error.value))[1]
    assert load(overrides=["task=lift-ph", f"task.env_kwargs={given}"]).task.env_kwargs == {**cfg.task.env_kwargs, "gripper_ramp": False}


@pytest.mark.parametrize(("stated", "given", "words"), [
    ({"type": "OSC_POSE", "kp": 50, "damping": 1, "control_delta": True}, {}, "kp is 50 there, 150 here"),
    ([{"kp": 150, "input_ref_frame": "world"}] * 2, {}, None),
    ({"body_parts": {"right": {"type": "OSC_POSE", "gripper": {"type": "GRIP"}}}}, {}, "input_ref_frame is 'base' there, 'world' here"),
    ({"output_max": 0.1, "kp": 50}, {"kp": 50}, "output_max is 0.1 there, [0.05, 0.05, 0.05, 0.5, 0.5, 0.5] here"),
    ({"kp": 50}, {"kp": 50.0}, None), ({}, {"kp": 50}, "kp is 150 there, 50 here"),
])
def test_data_of_another_controller_are_refused(stated, given, words):
    cfg = load(overrides=["task=lift-ph"])
    if given:
        cfg = cfg.replace({"task.env_kwargs.controller": given})
    data = Dataset([], "mine.hdf5", {"env_name": "Lift", "robosuite": "1.4.1", "controller_configs": json.dumps(stated)})
    if words is None:
        return check_task(cfg, data)
    with pytest.raises(DataError, match="mine.hdf5: was recorded with another controller than ") as error:
        check_task(cfg, data)
    assert f": {words}; " in str(error.value)
    check_task(load(overrides=["task=lift-ph", re.search(r"task.env_kwargs='.*'$", str(error.value))[0].replace("'", "")]), data)


@pytest.mark.parametrize("stated", ["{", '{"type": "JOINT_POSITION"}', "7", '[{"kp": 1}, {"kp": 2}]', '{"gain": 1}'])
def test_data_of_another_kind_of_control_are_refused(stated):
    with pytest.raises(DataError, match="mine.hdf5: was recorded with a controller that modip_ray.tasks.robosuite_env:robosuite_env does not have"):
        check_task(load(overrides=["task=lift-ph"]), Dataset([], "mine.hdf5", {"robosuite": "1.4.1", "controller_configs": stated}))


def test_other_subtasks_of_the_kitchen_are_refused(tmp_path):
    pytest.importorskip("gymnasium_robotics", reason="the kitchen: pip install gymnasium-robotics")
    cfg = load(overrides=["task=kitchen-complete"])
    env = env_factory(cfg.task)()
    obs = np.tile(env.reset(seed=0)[0].astype(np.float32), (4, 1))
    env.close()
    path = tmp_path / "k.hdf5"
    write_d4rl(path, [Episode(obs, np.zeros((3, 9), np.float32), np.zeros(3, np.float32), False)], {})
    assert read(path, "kitchen-complete").transitions == read(path, "kitchen-partial").transitions == 3   # one environment
    with pytest.raises(DataError, match=r"observations\[0, 41\], a column of the goal, is 0, but -0.88 for the .*bottom burner.*, and 3 of 30 columns"):
        read(path, "kitchen-mixed")


def test_the_official_kitchen_file(tmp_path):
    data = os.environ.get("MODIP_TEST_DATA", "")
    path = Path(data) / "mini_kitchen_microwave_kettle_light_slider-v0.hdf5"
    if not path.is_file():
        pytest.skip("real data: set MODIP_TEST_DATA to a folder with the kitchen file")
    episodes = read(path, "kitchen-complete").episodes
    assert len(episodes) == 19 and all(e.terminated and e.ret == 4 for e in episodes)
    with pytest.raises(DataError, match=r"a column of the goal, is 0, but -0.88"):
        read(path, "kitchen-mixed")
