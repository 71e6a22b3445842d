import h5py
import numpy as np
import pytest

from modip_ray.tasks.d4rl_data import DataError, describe, read_d4rl, read_policy, statistics, write_d4rl
from modip_ray.tasks.episode import Episode

KITCHEN = "mini_kitchen_microwave_kettle_light_slider-v0.hdf5"
HOPPER, CHEETAH = "hopper_medium-v2.head.hdf5", "halfcheetah_medium-v2.head.hdf5"


def episode(steps, terminated, rng):
    observations, actions, rewards = rng.normal(size=(steps + 1, 3)), rng.uniform(-1, 1, (steps, 2)), rng.normal(size=steps)
    return Episode(observations.astype(np.float32), actions.astype(np.float32), rewards.astype(np.float32), terminated)


@pytest.fixture
def episodes():
    rng = np.random.default_rng(0)
    return [episode(5, True, rng), episode(4, False, rng), episode(1, True, rng), episode(6, False, rng)]


@pytest.fixture
def written(tmp_path, episodes):
    write_d4rl(tmp_path / "data.hdf5", episodes, {"env_id": "Toy-v0"})
    return tmp_path / "data.hdf5"


def edit(path, **changes):
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


def same(a, b):
    return a.terminated == b.terminated and all(np.array_equal(getattr(a, k), getattr(b, k)) for k in ("observations", "actions", "rewards"))


# ---- what comes back -------------------------------------------------------------------------------------------------------------------------

def test_round_trip(written, episodes):
    dataset = read_d4rl(written)
    assert len(dataset.episodes) == 4 and all(same(a, b) for a, b in zip(dataset.episodes, episodes, strict=True))
    assert all(e.validate() for e in dataset.episodes) and dataset.metadata == {"env_id": "Toy-v0"} and dataset.notes == ()
    assert raw(written, "terminals").nonzero()[0].tolist() == [4, 9] and raw(written, "timeouts").nonzero()[0].tolist() == [8, 15]


def test_rows_after_the_last_end_are_a_cut_episode(written, episodes):
    edit(written, timeouts=raw(written, "timeouts") & (np.arange(16) != 15))
    last = read_d4rl(written).episodes[-1]
    assert same(last, episodes[-1]) and not last.terminated and "cut" in read_d4rl(written).notes[0]


def test_termination_wins_over_a_time_limit_at_the_same_step(written):
    edit(written, timeouts=raw(written, "timeouts") | raw(written, "terminals"))
    assert [e.terminated for e in read_d4rl(written).episodes] == [True, False, True, False]


def test_without_next_observations(written, episodes):
    edit(written, next_observations=None)
    dataset = read_d4rl(written)
    assert [e.length for e in dataset.episodes] == [5, 3, 1, 5]                             # timed out: the last transition is dropped
    first, second = dataset.episodes[:2]
    assert first.terminated and (first.rewards == episodes[0].rewards).all()
    assert (first.observations[-1] == episodes[0].observations[-2]).all()                   # unknown: repeats, and is never the next episode's first
    assert (second.observations == episodes[1].observations[:-1]).all() and not second.terminated
    assert "2 last transition(s)" in dataset.notes[0] and "2 terminated" in dataset.notes[1]


@pytest.mark.parametrize("with_next", [True, False])
def test_max_transitions_cuts_and_keeps_the_true_last_observation(written, episodes, with_next):
    if not with_next:
        edit(written, next_observations=None)
    dataset = read_d4rl(written, max_transitions=12)
    last = dataset.episodes[-1]
    assert (last.length, last.terminated) == (2, False) and (last.observations == episodes[3].observations[:3]).all()
    assert read_d4rl(written, max_transitions=99).transitions == (16 if with_next else 14)
    assert read_d4rl(written, max_transitions=5).episodes[-1].terminated                    # exactly at an end
    with pytest.raises(ValueError, match="max_transitions is 0"):
        read_d4rl(written, max_transitions=0)


def test_v0_files_without_timeouts(tmp_path):
    rng = np.random.default_rng(0)
    source = [episode(4, False, rng), episode(3, True, rng), episode(4, False, rng), episode(4, True, rng), episode(2, False, rng)]
    write_d4rl(tmp_path / "v0.hdf5", source, {})
    edit(tmp_path / "v0.hdf5", timeouts=None)
    with pytest.raises(DataError, match="'timeouts' is missing.*pass max_episode_steps"):
        read_d4rl(tmp_path / "v0.hdf5")
    read = read_d4rl(tmp_path / "v0.hdf5", max_episode_steps=4).episodes
    assert all(same(a, b) for a, b in zip(read, source, strict=True))


def test_an_unmarked_end_is_cut_not_joined(written, episodes):
    edit(written, timeouts=raw(written, "timeouts") & (np.arange(16) != 8))                 # medium-replay's buffers hold such cuts
    dataset = read_d4rl(written)
    assert [e.length for e in dataset.episodes] == [5, 4, 1, 6] and same(dataset.episodes[1], episodes[1])
    assert "first at row 8" in dataset.notes[0]


# ---- what is refused -------------------------------------------------------------------------------------------------------------------------

def changed(path, key, index, value):
    array = raw(path, key).astype(np.float32)
    array[index] = value
    edit(path, **{key: array})


@pytest.mark.parametrize(("break_it", "words"), [
    (lambda p: edit(p, rewards=None), "key 'rewards' is missing.*The file has .*observations"),
    (lambda p: edit(p, terminals=None), "key 'terminals' is missing"),
    (lambda p: changed(p, "observations", (7, 1), np.nan), r"observations\[7, 1\] is nan"),
    (lambda p: changed(p, "next_observations", (3, 2), np.inf), r"next_observations\[3, 2\] is inf"),
    (lambda p: changed(p, "rewards", 2, np.nan), r"rewards\[2\] is nan"),
    (lambda p: changed(p, "actions", (4, 1), -1.5), r"actions\[4, 1\] is -1.5; expected actions in \[-1, 1\]"),
    (lambda p: changed(p, "terminals", 6, 3), r"terminals\[6\] is 3"),
    (lambda p: edit(p, actions=raw(p, "actions")[:-1]), "'actions' has 15 rows, expected 16"),
    (lambda p: edit(p, rewards=np.zeros((16, 2))), r"'rewards' has shape \(16, 2\); expected 1"),
    (lambda p: edit(p, observations=np.zeros(16)), r"'observations' has shape \(16,\); expected 2"),
    (lambda p: edit(p, observations=np.array([b"x"] * 16)), "must be a dataset of numbers"),
    (lambda p: edit(p, next_observations=np.zeros((16, 4))), "4 columns, expected 3"),
    (lambda p: edit(p, next_observations=raw(p, "observations")), "expected the rows of an episode in time order"),
    (lambda p: edit(p, observations=np.full((16, 3), 1e60)), r"observations\[0, 0\] is inf"),
    (lambda p: p.write_bytes(p.read_bytes()[:-200]), "cannot be read as HDF5.*cut short"),
    (lambda p: p.write_bytes(b"<html>404</html>"), "cannot be read as HDF5"),
    (lambda p: p.unlink(), "no such file"),
])
def test_a_broken_file_is_named(written, break_it, words):
    break_it(written)
    with pytest.raises(DataError, match=words) as error:
        read_d4rl(written)
    assert str(error.value).startswith(str(written))


def test_action_range_can_be_widened(written):
    changed(written, "actions", (4, 1), -1.5)
    assert read_d4rl(written, action_range=(-2, 2)).episodes[0].actions[4, 1] == -1.5
    assert read_d4rl(written, action_range=None).transitions == 16


def test_a_lone_timed_out_step_without_next_observations_leaves_nothing(tmp_path):
    write_d4rl(tmp_path / "one.hdf5", [episode(1, False, np.random.default_rng(0))], {})
    edit(tmp_path / "one.hdf5", next_observations=None)
    with pytest.raises(DataError, match="no complete transition"):
        read_d4rl(tmp_path / "one.hdf5")


@pytest.mark.parametrize("seed", range(4))
def test_damaged_bytes_never_crash_the_reader(written, seed):
    """Flip bytes anywhere: the file is read (then every episode is valid) or DataError is raised, nothing else."""
    rng, good, refused = np.random.default_rng(seed), np.frombuffer(written.read_bytes(), np.uint8), 0
    for _ in range(60):
        bad = good.copy()
        bad[rng.integers(0, len(bad), 8)] = rng.integers(0, 256, 8)
        written.write_bytes(bad.tobytes())
        try:
            for e in read_d4rl(written).episodes:
                e.validate()
        except DataError:
            refused += 1
    assert refused > 0


# ---- writing ---------------------------------------------------------------------------------------------------------------------------------

def test_writing_is_all_or_nothing(written, episodes, tmp_path):
    before = written.read_bytes()
    with pytest.raises(DataError, match="/metadata/bad/thing is None"):
        write_d4rl(written, episodes, {"bad": {"thing": None}})
    assert written.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["data.hdf5"]
    with pytest.raises(DataError, match="no episode to write"):
        write_d4rl(tmp_path / "none.hdf5", [], {})
    wide = Episode(np.zeros((2, 4), np.float32), np.zeros((1, 2), np.float32), np.zeros(1, np.float32), False)
    with pytest.raises(DataError, match="episode 4 has 4 columns of observations, expected 3"):
        write_d4rl(tmp_path / "wide.hdf5", [*episodes, wide], {})
    broken = Episode(episodes[0].observations, episodes[0].actions * np.float32(np.nan), episodes[0].rewards, True)
    with pytest.raises(ValueError, match=r"episode 0: actions\[0, 0\] is nan"):
        write_d4rl(tmp_path / "nan.hdf5", [broken], {})


def test_policy_metadata(written, episodes):
    with pytest.raises(DataError, match="'metadata/policy' is missing"):
        read_policy(written)
    weight = np.eye(3, dtype=np.float32)
    write_d4rl(written, episodes, {"policy": {"fc0": {"weight": weight}, "nonlinearity": "relu"}, "seed": 3, "note": "±", "empty": ""})
    found = read_policy(written)
    assert (found["fc0.weight"] == weight).all() and found["nonlinearity"] == "relu" and read_d4rl(written).metadata == {"seed": 3, "note": "±", "empty": ""}


# ---- official files --------------------------------------------------------------------------------------------------------------------------

def test_official_kitchen(data_file):
    dataset = read_d4rl(data_file(KITCHEN))
    s = statistics(dataset)
    assert (s["episodes"], s["transitions"], s["terminated"], s["obs_dim"], s["action_dim"]) == (19, 3680, 19, 60, 9)
    assert (s["length"]["min"], s["length"]["max"]) == (182, 207)
    assert all(e.validate().rewards[-1] == 4.0 and e.rewards.max() == 4.0 for e in dataset.episodes)
    assert all((e.observations[-1] == e.observations[-2]).all() for e in dataset.episodes) and "19 terminated" in dataset.notes[0]
    assert "3,680" in describe(dataset)


def test_official_hopper_head(data_file):
    dataset = read_d4rl(data_file(HOPPER))
    assert dataset.returns == pytest.approx([1465.2, 1412.7], abs=0.06) and [e.length for e in dataset.episodes] == [470, 441]
    assert all(e.validate().terminated for e in dataset.episodes) and dataset.notes == () and dataset.metadata["algorithm"] == "SAC"
    last = dataset.episodes[0].observations[-1]
    assert (last == raw(data_file(HOPPER), "next_observations")[469]).all() and (last != raw(data_file(HOPPER), "observations")[470]).any()


def test_official_halfcheetah_head(data_file):
    dataset = read_d4rl(data_file(CHEETAH))
    assert dataset.returns == pytest.approx([4669.5, 4880.0], abs=0.06) and [e.length for e in dataset.episodes] == [1000, 1000]
    assert not any(e.validate().terminated for e in dataset.episodes)


@pytest.mark.parametrize("name", [HOPPER, CHEETAH])
def test_official_round_trip(data_file, tmp_path, name):
    dataset = read_d4rl(data_file(name))
    write_d4rl(tmp_path / "copy.hdf5", dataset.episodes, {})
    for key in ("observations", "next_observations", "actions", "rewards", "terminals", "timeouts"):
        assert (raw(tmp_path / "copy.hdf5", key) == raw(data_file(name), key)).all(), key
