import json
import warnings

import gymnasium as gym
import h5py
import numpy as np
import pytest

from modip_ray.tasks.dataset import DataError, describe
from modip_ray.tasks.episode import Episode
from modip_ray.tasks.minari_data import read_minari, write_minari

minari = pytest.importorskip("minari", reason="Minari datasets: pip install 'minari[hdf5]'")
from minari.data_collector import EpisodeBuffer  # noqa: E402

ID = "toy/made/random-v0"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return tmp_path / "minari"


@pytest.fixture
def episodes():
    rng = np.random.default_rng(0)

    def episode(steps, terminated):
        arrays = rng.normal(size=(steps + 1, 3)), rng.uniform(-1, 1, (steps, 2)), rng.normal(size=steps)
        return Episode(*(a.astype(np.float32) for a in arrays), terminated)
    return [episode(5, True), episode(4, False), episode(1, True), episode(6, False)]


def same(a, b):
    return a.terminated == b.terminated and all(np.array_equal(getattr(a, k), getattr(b, k)) for k in ("observations", "actions", "rewards"))


def make(observation_space, action_space, *buffers, dataset_id=ID):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        minari.create_dataset_from_buffers(dataset_id, list(buffers), observation_space=observation_space, action_space=action_space)


def box(*shape, dtype=np.float64):
    return gym.spaces.Box(-10, 10, shape, dtype)


def steps(count, observations=None, actions=None, **changes):
    """A buffer of `count` steps that ends by truncation."""
    values = {"observations": np.zeros((count + 1, 3)) if observations is None else observations,
              "actions": np.zeros((count, 2)) if actions is None else actions,
              "rewards": np.arange(count, dtype=float), "terminations": np.zeros(count, bool), "truncations": np.arange(count) == count - 1}
    return EpisodeBuffer(**values | changes)


# ---- what comes back -------------------------------------------------------------------------------------------------------------------------

def test_round_trip(episodes):
    write_minari(ID, episodes, description="made up", algorithm="dice")
    read = read_minari(ID)
    assert all(same(a, b) for a, b in zip(read.episodes, episodes, strict=True)) and read.notes == () and read.source == f"minari:{ID}"
    assert read.metadata == {"minari_id": ID, "minari_version": minari.__version__, "algorithm_name": "dice", "description": "made up"}
    assert "4  (2 terminated" in describe(read)


def test_the_environment_is_recorded(episodes):
    three = [Episode(np.zeros((2, 11), np.float32), np.zeros((1, 3), np.float32), np.zeros(1, np.float32), True)]
    write_minari(ID, three, "Hopper-v4")
    assert read_minari(ID).metadata["env"] == "Hopper-v4" and minari.load_dataset(ID).action_space == gym.make("Hopper-v4").action_space
    with pytest.raises(DataError, match="actions have 2 columns, but the action space of Hopper-v4 is Box"):
        write_minari("other-v0", episodes, "Hopper-v4")
    with pytest.raises(DataError, match="environment 'Hoper-v4' cannot be made"):
        write_minari("other-v0", episodes, "Hoper-v4")


@pytest.mark.parametrize(("env_id", "limit"), [("Hopper-v4", 20), ("Pendulum-v1", 7)])
def test_a_dataset_of_minaris_own_making(env_id, limit):
    """Stepped by hand, as float64, and compared with what the environment said."""
    env, rng, buffers, said = gym.make(env_id, max_episode_steps=limit), np.random.default_rng(1), [], []
    for seed in range(4):
        rows, done = {"observations": [env.reset(seed=seed)[0]], "actions": [], "rewards": [], "terminations": [], "truncations": []}, False
        while not done:
            action = rng.uniform(env.action_space.low, env.action_space.high).astype(env.action_space.dtype)
            *result, _ = env.step(action)
            for key, value in zip(("observations", "rewards", "terminations", "truncations"), result, strict=True):
                rows[key].append(value)
            rows["actions"].append(action)
            done = result[2] or result[3]
        buffers.append(EpisodeBuffer(seed=seed, **{k: np.asarray(v) for k, v in rows.items()}))
        said.append(rows)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        minari.create_dataset_from_buffers(ID, buffers, env=env)
    read = read_minari(ID)
    assert len({e.terminated for e in read.episodes}) == (2 if env_id == "Hopper-v4" else 1)        # random Hopper falls, or lasts to the limit
    for episode, rows in zip(read.episodes, said, strict=True):
        assert episode.validate().terminated == rows["terminations"][-1] and episode.length == len(rows["rewards"])
        assert np.array_equal(episode.observations, np.asarray(rows["observations"], np.float32))
        assert np.array_equal(episode.rewards, np.asarray(rows["rewards"], np.float32)) and np.array_equal(episode.actions, rows["actions"])
    assert read.metadata["env"] == env_id and read.notes == ()


def test_minaris_collector():
    pytest.importorskip("jax", reason="minari.DataCollector needs jax: pip install 'minari[create]'")
    env = minari.DataCollector(gym.make("Pendulum-v1", max_episode_steps=5))
    last = []
    for seed in range(3):
        env.reset(seed=seed)
        for _ in range(5):
            observation = env.step(env.action_space.sample())[0]
        last.append(observation)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        env.create_dataset(ID)
    read = read_minari(ID)
    assert [e.length for e in read.episodes] == [5, 5, 5] and not any(e.terminated for e in read.episodes)
    assert all(np.array_equal(e.observations[-1], o) for e, o in zip(read.episodes, last, strict=True))


class NestedEnv(gym.Env):
    observation_space = gym.spaces.Dict({"z": box(2), "a": gym.spaces.Dict({"y": box(1), "b": box(2, 2)}), "m": box(3, dtype=np.float32)})
    action_space = box(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        return self.observation_space.sample(), {}


def test_dict_observations_are_flattened_as_gymnasium_does():
    env = NestedEnv()
    rows = [env.reset(seed=s)[0] for s in range(4)]
    stacked = {"z": np.stack([r["z"] for r in rows]), "m": np.stack([r["m"] for r in rows]),
               "a": {k: np.stack([r["a"][k] for r in rows]) for k in ("y", "b")}}
    make(env.observation_space, env.action_space, steps(3, stacked))
    flat = gym.wrappers.FlattenObservation(NestedEnv())
    expected = np.stack([flat.reset(seed=s)[0] for s in range(4)])
    assert expected.shape == (4, 10) and np.array_equal(read_minari(ID).episodes[0].observations, expected.astype(np.float32))


def test_max_transitions(episodes):
    write_minari(ID, episodes)
    read = read_minari(ID, max_transitions=7)
    assert [e.length for e in read.episodes] == [5, 2] and same(read.episodes[0], episodes[0]) and not read.episodes[1].terminated
    assert np.array_equal(read.episodes[1].observations, episodes[1].observations[:3])
    assert read_minari(ID, max_transitions=5).episodes[-1].terminated and read_minari(ID, max_transitions=99).transitions == 16
    with pytest.raises(ValueError, match="max_transitions is 0"):
        read_minari(ID, max_transitions=0)


def test_an_unmarked_end_and_a_double_one():
    make(box(3), box(2), steps(3, truncations=np.zeros(3, bool)), steps(2, terminations=np.array([False, True])))
    read = read_minari(ID)
    assert [e.terminated for e in read.episodes] == [False, True] and "1 episode(s) end neither" in read.notes[0]


# ---- what is refused -------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("spaces", "buffer", "words"), [
    ((box(3), gym.spaces.Discrete(3)), steps(2, actions=np.zeros(2, int)), r"action space is Discrete\(3\); expected a Box with one dimension"),
    ((gym.spaces.Discrete(3), box(2)), steps(2, np.zeros(3, int)), r"observations are Discrete\(3\); expected a Box of numbers"),
    ((gym.spaces.Dict({"text": gym.spaces.Text(4)}), box(2)), steps(2, {"text": ["a", "b", "c"]}), "observations/text are Text"),
    ((gym.spaces.Box(0, 255, (40, 40, 3), np.uint8), box(2)), steps(2, np.zeros((3, 40, 40, 3), np.uint8)), "observations are images"),
    ((box(3), box(2)), steps(2, np.full((3, 3), np.nan)), r"episode 0: observations\[0, 0\] is nan"),
    ((box(3), box(2)), steps(2, np.full((3, 3), 1e60)), r"episode 0: observations\[0, 0\] is inf"),
    ((box(3), box(2)), steps(2, np.zeros((2, 3))), r"episode 0: observations has shape \(2, 3\), expected \(3, 3\)"),
    ((box(3), box(2)), steps(2, actions=np.zeros((3, 2))), "episode 0: actions have 3 rows, expected 2"),
    ((box(3), box(2)), steps(3, terminations=np.array([False, True, False])), r"terminations\[1\] is set, but the episode goes on to step 3"),
    ((box(3), box(2)), steps(3, truncations=np.zeros(2, bool)), r"truncations has shape \(2,\), expected \(3,\)"),
])
def test_an_unsound_dataset_is_named(spaces, buffer, words):
    make(*spaces, buffer)
    with pytest.raises(DataError, match=words) as error:
        read_minari(ID)
    assert str(error.value).startswith(f"minari:{ID}")


@pytest.mark.parametrize(("name", "damage"), [
    ("metadata.json", lambda b: b[:40]), ("metadata.json", lambda b: b"{}"), ("metadata.json", lambda b: b"[1, 2]"), ("main_data.hdf5", lambda b: b[:-300]),
    ("main_data.hdf5", lambda b: b""), ("main_data.hdf5", lambda b: b"<html>"), ("metadata.json", lambda b: b.replace(b'"0.5.', b'"9.5.')),
])
def test_damage_is_told(episodes, folder, name, damage):
    write_minari(ID, episodes)
    file = folder / ID / "data" / name
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(DataError, match=f"minari:{ID}: cannot be read; is it damaged, or made by a newer minari"):
        read_minari(ID)


def test_missing_keys_are_told(episodes, folder):
    write_minari(ID, episodes)
    with h5py.File(folder / ID / "data" / "main_data.hdf5", "r+") as file:
        del file["episode_1/rewards"]
    with pytest.raises(DataError, match="cannot be read.*rewards"):
        read_minari(ID)


def test_a_dataset_that_is_not_here(episodes, folder):
    with pytest.raises(DataError, match=rf"minari:{ID}: is not in {folder} \(MINARI_DATASETS_PATH sets another folder\), which holds no dataset"):
        read_minari(ID)
    write_minari(ID, episodes)
    with pytest.raises(DataError, match=f"did you mean '{ID}'"):
        read_minari(ID[:-1] + "1")
    for bad in ("no version", "../x-v0", "x-v"):
        with pytest.raises(DataError, match="is no Minari id; expected NAMESPACE/NAME-vN"):
            read_minari(bad)


def test_a_download_that_fails_leaves_nothing(folder, monkeypatch):
    def half(dataset_id):
        (folder / dataset_id / "data").mkdir(parents=True)
        (folder / dataset_id / "data" / "main_data.hdf5").write_bytes(b"half")
        raise ConnectionError("no route to host")
    monkeypatch.setattr(minari, "download_dataset", half)
    with pytest.raises(DataError, match=r"cannot be downloaded \(ConnectionError: no route to host\).*'minari download toy/made/random-v0' on another machine"):
        read_minari(ID, download=True)
    assert not (folder / ID).exists()


def test_a_download_without_its_package(folder, monkeypatch):
    def download(dataset_id):
        raise ImportError('huggingface_hub is not installed. Please install it using `pip install "minari[hf]"`')
    monkeypatch.setattr(minari, "download_dataset", download)
    with pytest.raises(DataError, match=r"downloads need a package that is missing \(huggingface_hub is not installed"):
        read_minari(ID, download=True)


def test_a_download_that_succeeds(episodes, monkeypatch):
    monkeypatch.setattr(minari, "download_dataset", lambda dataset_id: write_minari(dataset_id, episodes))
    assert read_minari(ID, download=True).transitions == 16


# ---- writing ---------------------------------------------------------------------------------------------------------------------------------

def test_writing_is_whole_or_not_at_all(episodes, folder, monkeypatch):
    write_minari(ID, episodes)
    before = json.loads((folder / ID / "data" / "metadata.json").read_text())
    with pytest.raises(DataError, match=f"exists already.*'minari delete {ID}'"):
        write_minari(ID, episodes[:1])
    assert json.loads((folder / ID / "data" / "metadata.json").read_text()) == before
    with pytest.raises(DataError, match="no episode to write"):
        write_minari("none-v0", [])
    wide = Episode(np.zeros((2, 4), np.float32), np.zeros((1, 2), np.float32), np.zeros(1, np.float32), False)
    with pytest.raises(DataError, match="episode 4 has 4 columns of observations and 2 of actions, expected 3 and 2"):
        write_minari("wide-v0", [*episodes, wide])
    monkeypatch.setattr(minari.MinariDataset, "__init__", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(DataError, match=r"minari:full-v0: cannot be written \(OSError: disk full\)"):
        write_minari("full-v0", episodes)
    assert not (folder / "full-v0").exists() and not (folder / "wide-v0").exists()
