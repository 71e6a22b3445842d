import json

import h5py
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from modip_ray.tasks import robomimic_data
from modip_ray.tasks.dataset import DataError, describe, statistics
from modip_ray.tasks.robomimic_data import LAYOUTS, object_vector, read_env_args, read_robomimic, robosuite_version

LIFT = "lift_ph_first10_low_dim.hdf5"
LENGTHS = {"demo_0": 5, "demo_2": 3, "demo_10": 4}                     # as text, demo_10 comes before demo_2
VERSIONS = {"v0.1": None, "v1.4": "1.4.1", "v1.5": "1.5.1"}


def quaternions(rng, rows):
    return Rotation.random(rows, random_state=int(rng.integers(2**31))).as_quat()


def in_file(task, parts, robots, version):
    """The object's columns as robosuite of that version has them, with relative poses from scipy; 1.5 takes Can's and Square's from the row before."""
    hands = [robot[0] for robot in robots]
    if task == "Lift":
        sign = -1 if version == "v1.5" else 1
        return np.concatenate([parts["cube_pos"], parts["cube_quat"], sign * (hands[0] - parts["cube_pos"])], 1)
    if task == "TwoArmTransport":
        reaches = [parts["payload_pos"] - hands[0], parts["lid_handle_pos"] - hands[0], parts["payload_pos"] - hands[1], parts["trash_pos"] - hands[1]]
        places = [parts[key] for key, size in LAYOUTS[task].absolute if size > 1]
        done = [parts["payload_in_target_bin"], parts["trash_in_trash_bin"]]
        return np.concatenate([*places, *(done + reaches if version == "v1.5" else reaches + done)], 1)
    position, quaternion = (parts[key] for key, _ in LAYOUTS[task].absolute)
    seen = [np.concatenate([x[:1], x[:-1]]) if version == "v1.5" else x for x in (position, quaternion)]
    to_hand = Rotation.from_quat(robots[0][1]).inv()
    turn = (to_hand * Rotation.from_quat(seen[1])).as_quat()
    relative = [to_hand.apply(seen[0] - hands[0]), np.where(turn[:, 3:] < 0, -turn, turn)]
    return np.concatenate([*relative, position, quaternion] if version == "v1.5" else [position, quaternion, *relative], 1)


def write(path, task="Lift", version="v0.1", next_obs=True, lengths=LENGTHS, variable_text=False):
    """A small robomimic file; returns {demo: its observations in this project's order}."""
    rng, expected, layout = np.random.default_rng(0), {}, LAYOUTS[task]
    meta = {"env_name": task, "type": 1, "env_kwargs": {"robots": ["Panda"] * layout.robots, "controller_configs": {"type": "OSC_POSE"}}}
    if VERSIONS[version]:
        meta["env_version"] = VERSIONS[version]
    text = json.dumps(meta)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = text if variable_text else np.bytes_(text)
        for name, steps in lengths.items():
            rows = steps + 1
            walk = [rng.normal(0, 0.002, (rows, 3)).cumsum(0) + rng.normal(size=3) for _ in range(12)]         # things move slowly
            parts = {key: walk[i] if size == 3 else quaternions(rng, rows) if size == 4 else rng.integers(0, 2, (rows, 1)).astype(float)
                     for i, (key, size) in enumerate(layout.absolute)}
            robots = [[walk[-1 - i], quaternions(rng, rows), rng.normal(size=(rows, 2))] for i in range(layout.robots)]
            columns = {"object": in_file(task, parts, robots, version), "robot0_joint_pos": rng.normal(size=(rows, 7))}
            columns |= {f"robot{i}_{key}": value for i, robot in enumerate(robots)
                        for key, value in zip(("eef_pos", "eef_quat", "gripper_qpos"), robot, strict=True)}
            demo = data.create_group(name)
            for key, value in columns.items():
                demo[f"obs/{key}"] = value[:-1]
                if next_obs:
                    demo[f"next_obs/{key}"] = value[1:]
            demo["actions"], demo["rewards"] = rng.uniform(-1, 1, (steps, 7 * layout.robots)), (np.arange(steps) >= steps - 2).astype(float)
            demo["dones"], demo["states"] = np.zeros(steps, int), rng.normal(size=(steps, 32))
            expected[name] = np.concatenate([in_file(task, parts, robots, "v0.1"), *(v for robot in robots for v in robot)], 1).astype(np.float32)
        file["mask/train"] = np.array([b"demo_10", b"demo_0"])
    return expected


@pytest.fixture
def lift(tmp_path):
    write(tmp_path / "lift.hdf5")
    return tmp_path / "lift.hdf5"


def edit(path, changes):
    """Replace (array) or delete (None) keys of an HDF5 file."""
    with h5py.File(path, "r+") as file:
        for key, value in changes.items():
            if key in file:
                del file[key]
            if value is not None:
                file[key] = value


def raw(path, key):
    with h5py.File(path) as file:
        return file[key][()]


# ---- what comes back -------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("task", LAYOUTS)
def test_every_version_gives_the_same_observations(tmp_path, task, version):
    expected = write(tmp_path / "f.hdf5", task, version)
    dataset = read_robomimic(tmp_path / "f.hdf5")
    assert [e.length for e in dataset.episodes] == [5, 3, 4] and not any(e.validate().terminated for e in dataset.episodes)
    for episode, name in zip(dataset.episodes, ("demo_0", "demo_2", "demo_10"), strict=True):
        assert episode.observations.shape[1] == {"Lift": 19, "TwoArmTransport": 59}.get(task, 23)
        np.testing.assert_allclose(episode.observations, expected[name], atol=2e-6)
        assert (episode.actions == raw(tmp_path / "f.hdf5", f"data/{name}/actions").astype(np.float32)).all()
        assert episode.rewards.tolist() == [0.0] * (episode.length - 2) + [1.0, 1.0]
    assert len(dataset.notes) == (version == "v1.5") and dataset.metadata["env_name"] == task and dataset.metadata["controller"] == "OSC_POSE"
    assert dataset.metadata["controller_configs"] == '{"type": "OSC_POSE"}' and dataset.metadata["demonstrations"] == 3
    assert dataset.metadata["robosuite"].startswith(VERSIONS[version] or "not stated")


def test_filter_keys(lift):
    dataset = read_robomimic(lift, filter_key="train")
    assert [e.length for e in dataset.episodes] == [5, 4] and dataset.metadata["filter_key"] == "train"
    with pytest.raises(DataError, match="'mask/valid' is missing; there is train"):
        read_robomimic(lift, filter_key="valid")
    edit(lift, {"mask/train": np.array([b"demo_0", b"demo_7"])})
    with pytest.raises(DataError, match="mask/train names demo_7, which data/ does not have"):
        read_robomimic(lift, filter_key="train")
    edit(lift, {"mask/train": np.arange(3)})
    with pytest.raises(DataError, match="must be a list of names"):
        read_robomimic(lift, filter_key="train")
    edit(lift, {"mask": None})
    with pytest.raises(DataError, match="'mask/train' is missing; there is no mask at all"):
        read_robomimic(lift, filter_key="train")


@pytest.mark.parametrize(("limit", "lengths"), [(1, [1]), (5, [5]), (7, [5, 2]), (99, [5, 3, 4])])
@pytest.mark.parametrize("next_obs", [True, False])
def test_max_transitions_cuts_and_keeps_the_true_last_observation(tmp_path, next_obs, limit, lengths):
    expected = write(tmp_path / "f.hdf5", next_obs=next_obs)
    dataset = read_robomimic(tmp_path / "f.hdf5", max_transitions=limit)
    if not next_obs:                                                   # only a demonstration's own end is unknown
        lengths = {1: [1], 5: [4, 1], 7: [4, 2, 1], 99: [4, 2, 3]}[limit]
    assert [e.length for e in dataset.episodes] == lengths
    for episode, name in zip(dataset.episodes, LENGTHS, strict=False):
        np.testing.assert_allclose(episode.observations, expected[name][:episode.length + 1], atol=1e-6)
    with pytest.raises(ValueError, match="max_transitions is 0"):
        read_robomimic(tmp_path / "f.hdf5", max_transitions=0)


def test_without_next_obs_the_last_transitions_are_dropped(tmp_path):
    expected = write(tmp_path / "f.hdf5", next_obs=False, lengths={"demo_0": 5, "demo_1": 1, "demo_2": 2})
    dataset = read_robomimic(tmp_path / "f.hdf5")
    assert [e.length for e in dataset.episodes] == [4, 1] and "3 last transition(s) dropped" in dataset.notes[0]
    np.testing.assert_allclose(dataset.episodes[0].observations, expected["demo_0"][:5], atol=1e-6)
    write(tmp_path / "g.hdf5", next_obs=False, lengths={"demo_0": 1})
    with pytest.raises(DataError, match="no complete transition"):
        read_robomimic(tmp_path / "g.hdf5")


def test_without_next_obs_a_success_at_the_end_can_be_kept(tmp_path):
    """In many files the only success is at the last row."""
    expected = write(tmp_path / "f.hdf5", next_obs=False, lengths={"demo_0": 5, "demo_1": 1, "demo_2": 3})
    edit(tmp_path / "f.hdf5", {"data/demo_0/rewards": np.float64([0, 0, 0, 0, 1]), "data/demo_2/rewards": np.zeros(3)})
    dataset = read_robomimic(tmp_path / "f.hdf5", keep_success=True)
    assert [e.length for e in dataset.episodes] == [5, 1, 2] and [e.rewards[-1] for e in dataset.episodes] == [1, 1, 0]
    assert "1 last transition(s) dropped" in dataset.notes[0] and "the last observation of 2 episode(s) that end in success repeats" in dataset.notes[1]
    first = dataset.episodes[0].validate().observations
    np.testing.assert_allclose(first, expected["demo_0"][[0, 1, 2, 3, 4, 4]], atol=1e-6)
    assert [e.length for e in read_robomimic(tmp_path / "f.hdf5", max_transitions=4, keep_success=True).episodes] == [4]
    assert read_robomimic(tmp_path / "f.hdf5", max_transitions=4).notes == ()                       # the cut's next observation is known
    write(tmp_path / "g.hdf5", lengths={"demo_0": 5})
    (kept,), (plain,) = (read_robomimic(tmp_path / "g.hdf5", keep_success=keep).episodes for keep in (True, False))
    assert (kept.observations == plain.observations).all()


def test_other_observation_keys_come_as_they_are(lift):
    dataset = read_robomimic(lift, obs_keys=["robot0_joint_pos", "object"])
    first = np.concatenate([raw(lift, "data/demo_0/obs/robot0_joint_pos"), raw(lift, "data/demo_0/obs/object")], 1)
    assert (dataset.episodes[0].observations[:-1] == first.astype(np.float32)).all()
    with pytest.raises(DataError, match="'data/demo_0/obs/robot0_secret' is missing"):
        read_robomimic(lift, obs_keys=["robot0_secret"])


def test_environment_description(lift, tmp_path):
    assert read_env_args(lift)["env_name"] == "Lift" and robosuite_version(read_env_args(lift)) == (0,)
    assert robosuite_version({"env_version": "1.5.1"}) == (1, 5, 1) and robosuite_version({"env_version": "new"}) == (0,)
    write(tmp_path / "f.hdf5", version="v1.4", variable_text=True)
    assert robosuite_version(read_env_args(tmp_path / "f.hdf5")) == (1, 4, 1)


def test_object_vector_of_one_row():
    """A quarter turn about z by hand: the can 1 m ahead of a gripper that looks along y."""
    half = np.sqrt(0.5)
    can = {"Can_pos": np.array([0.0, 1.0, 0.0]), "Can_quat": np.array([0.0, 0.0, half, half])}
    vector = object_vector("PickPlaceCan", can, [[np.zeros(3), np.array([0.0, 0.0, half, half])]])
    np.testing.assert_allclose(vector, [0, 1, 0, 0, 0, half, half, 1, 0, 0, 0, 0, 0, 1], atol=1e-12)


# ---- what is refused -------------------------------------------------------------------------------------------------------------------------

def changed(path, key, index, value):
    array = raw(path, key)
    array[index] = value
    edit(path, {key: array})


def attribute(path, value):
    with h5py.File(path, "r+") as file:
        if value is None:
            del file["data"].attrs["env_args"]
        else:
            file["data"].attrs["env_args"] = np.bytes_(value)


D = "data/demo_2/"


@pytest.mark.parametrize(("break_it", "words"), [
    (lambda p: edit(p, {"data": None}), "group 'data' is missing.*The file has mask"),
    (lambda p: edit(p, {f"data/{demo}": None for demo in LENGTHS}), "'data' holds no demonstration"),
    (lambda p: edit(p, {"data/thing": np.zeros(3)}), "data/thing is no demonstration"),
    (lambda p: edit(p, {D + "obs": None}), "'data/demo_2/obs' is missing.*dataset_states_to_obs"),
    (lambda p: edit(p, {D + "actions": None}), "'data/demo_2/actions' is missing"),
    (lambda p: edit(p, {D + "rewards": None}), "'data/demo_2/rewards' is missing"),
    (lambda p: edit(p, {D + "obs/object": None}), "'data/demo_2/obs/object' is missing"),
    (lambda p: edit(p, {D + "next_obs/robot0_eef_pos": None}), "'data/demo_2/next_obs/robot0_eef_pos' is missing"),
    (lambda p: edit(p, {"data/demo_0/obs/robot0_eef_pos": None}), "has no robot0_eef_pos"),
    (lambda p: changed(p, D + "obs/object", (1, 4), np.nan), r"data/demo_2/obs/object\[1, 4\] is nan"),
    (lambda p: changed(p, D + "next_obs/object", (2, 0), np.inf), r"data/demo_2/next_obs/object\[2, 0\] is inf"),
    (lambda p: changed(p, D + "rewards", 1, np.nan), r"data/demo_2/rewards\[1\] is nan"),
    (lambda p: changed(p, D + "actions", (2, 3), 1.5), r"data/demo_2/actions\[2, 3\] is 1.5; expected actions in \[-1, 1\]"),
    (lambda p: changed(p, D + "actions", (0, 0), np.nan), r"data/demo_2/actions\[0, 0\] is nan"),
    (lambda p: changed(p, D + "obs/object", (1, 0), 9.0), r"data/demo_2/next_obs\[0\] is not data/demo_2/obs\[1\]"),
    (lambda p: edit(p, {D + "rewards": np.zeros(4)}), "'data/demo_2/rewards' has 4 rows, expected 3"),
    (lambda p: edit(p, {D + "obs/object": np.zeros((2, 10))}), "'data/demo_2/obs/object' has 2 rows, expected 3"),
    (lambda p: edit(p, {D + "next_obs/object": np.zeros((4, 10))}), "'data/demo_2/next_obs/object' has 4 rows, expected 3"),
    (lambda p: edit(p, {D + f"{part}/object": np.zeros((3, 9)) for part in ("obs", "next_obs")}), "data/demo_2 has observations of 18 columns, expected 19"),
    (lambda p: edit(p, {D + "obs/robot0_eef_quat": np.zeros((3, 3))}), "'data/demo_2/obs/robot0_eef_quat' has 3 columns, expected 4"),
    (lambda p: edit(p, {D + "actions": np.zeros((3, 6))}), "data/demo_2/actions has 6 columns, expected 7"),
    (lambda p: edit(p, {D + "actions": np.zeros(3)}), r"'data/demo_2/actions' has shape \(3,\); expected 2"),
    (lambda p: edit(p, {D + "actions": np.array([b"x"] * 3)}), "must be a dataset of numbers"),
    (lambda p: edit(p, {D + "actions": np.zeros((0, 7))}), "'data/demo_2/actions' has no rows"),
    (lambda p: edit(p, {"data/demo_2": np.zeros(3)}), "'data/demo_2/obs' is missing"),
    (lambda p: attribute(p, None), "attribute 'env_args' of 'data' is missing"),
    (lambda p: attribute(p, "{"), "is not JSON"),
    (lambda p: attribute(p, "[1]"), "must be an object with 'env_name'"),
    (lambda p: attribute(p, '{"env_name": "PickPlaceCan"}'), "PickPlaceCan's object and robot.* have 19 columns, expected 23"),
    (lambda p: p.write_bytes(p.read_bytes()[:-500]), "cannot be read as HDF5.*cut short"),
    (lambda p: p.write_bytes(b"<html>404</html>"), "cannot be read as HDF5"),
    (lambda p: p.unlink(), "no such file"),
])
def test_a_broken_file_is_named(lift, break_it, words):
    break_it(lift)
    with pytest.raises(DataError, match=words) as error:
        read_robomimic(lift)
    assert str(error.value).startswith(str(lift))


def test_columns_of_an_unknown_order_are_refused(lift):
    with h5py.File(lift, "r+") as file:
        for demo in file["data"].values():
            for part in ("obs", "next_obs"):
                demo[part]["object"][:, 7:] += 1.0
    with pytest.raises(DataError, match="'object' are of no known order.* 1 m off"):
        read_robomimic(lift)
    assert read_robomimic(lift, obs_keys=["object"]).transitions == 12


def test_damaged_text_is_read_by_a_process_that_can_be_stopped(tmp_path, monkeypatch):
    """HDF5 1.14 loops for ever in a heap of variable-size texts whose size is damaged; found by flipping bytes."""
    write(tmp_path / "f.hdf5", variable_text=True)
    content = bytearray((tmp_path / "f.hdf5").read_bytes())
    content[content.index(b"GCOL") + 8] = 174                          # the heap's size, 4096, becomes 4270
    (tmp_path / "f.hdf5").write_bytes(content)
    monkeypatch.setattr(robomimic_data, "TEXT_SECONDS", 1)
    with pytest.raises(DataError, match="the text in 'data', attribute 'env_args', cannot be read; the file is damaged"):
        read_robomimic(tmp_path / "f.hdf5")


@pytest.mark.parametrize("seed", range(2))
def test_damaged_bytes_never_crash_the_reader(lift, seed):
    """Flip bytes anywhere: the file is read (then every episode is valid) or DataError is raised, nothing else."""
    rng, good, refused = np.random.default_rng(seed), np.frombuffer(lift.read_bytes(), np.uint8), 0
    for _ in range(40):
        bad = good.copy()
        bad[rng.integers(0, len(bad), 8)] = rng.integers(0, 256, 8)
        lift.write_bytes(bad.tobytes())
        try:
            for e in read_robomimic(lift, filter_key="train").episodes:
                e.validate()
        except DataError:
            refused += 1
    assert refused > 0


# ---- the official file -----------------------------------------------------------------------------------------------------------------------

def test_official_lift(data_file):
    path = data_file(LIFT)
    dataset = read_robomimic(path)
    s = statistics(dataset)
    assert (s["episodes"], s["transitions"], s["terminated"], s["obs_dim"], s["action_dim"]) == (10, 531, 0, 19, 7) and dataset.notes == ()
    assert all(e.validate().rewards.max() == 1.0 and set(e.rewards.tolist()) == {0.0, 1.0} for e in dataset.episodes)       # all successful
    first = dataset.episodes[0].observations
    assert (first[:-1, :10] == raw(path, "data/demo_0/obs/object").astype(np.float32)).all()
    assert (first[1:, 10:13] == raw(path, "data/demo_0/next_obs/robot0_eef_pos").astype(np.float32)).all()
    np.testing.assert_allclose(first[:, 7:10], first[:, 10:13] - first[:, :3], atol=1e-6)                                   # cube to gripper
    valid = read_robomimic(path, filter_key="valid")
    assert [e.length for e in valid.episodes] == [dataset.episodes[i].length for i in (0, 4, 8)] and "Lift" in describe(dataset)
