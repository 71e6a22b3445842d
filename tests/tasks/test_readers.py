import h5py
import numpy as np
import pytest

from modip_ray.tasks import catalogue as cat
from modip_ray.tasks.d4rl_data import write_d4rl
from modip_ray.tasks.dataset import DataError
from modip_ray.tasks.episode import Episode
from modip_ray.tasks.readers import layout, read_any


@pytest.fixture
def episodes():
    rng = np.random.default_rng(0)
    return [Episode(rng.normal(size=(6, 3)).astype(np.float32), rng.uniform(-1, 1, (5, 2)).astype(np.float32), np.ones(5, np.float32), True)] * 2


@pytest.fixture
def file(tmp_path, episodes):
    write_d4rl(tmp_path / "data.hdf5", episodes, {})
    return tmp_path / "data.hdf5"


def test_a_d4rl_file(file, monkeypatch):
    assert read_any(file, max_transitions=7).transitions == 7 and read_any(str(file)).source == str(file)
    monkeypatch.setenv("HOME", str(file.parent))
    assert read_any("~/data.hdf5").transitions == 10
    with h5py.File(file, "r+") as f:
        del f["timeouts"]
    assert [e.length for e in read_any(file, max_episode_steps=3).episodes] == [3, 2, 3, 2]
    with pytest.raises(DataError, match="'timeouts' is missing"):
        read_any(file)


def test_the_action_range_is_checked_in_every_source(file, episodes, tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"actions\[\d, \d\] is .*; expected actions in \[-0.1, 0.1\]"):
        read_any(file, action_range=(-0.1, 0.1))
    pytest.importorskip("minari", reason="Minari datasets: pip install 'minari[hdf5]'")
    from modip_ray.tasks.minari_data import write_minari
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    write_minari("toy-v0", episodes)
    assert read_any("minari:toy-v0", max_transitions=6, action_range=(-1, 1)).transitions == 6
    with pytest.raises(DataError, match=r"minari:toy-v0: episode 0: actions\[\d, \d\] is .*; expected actions in \[-0.1, 0.1\]"):
        read_any("minari:toy-v0", action_range=(-0.1, 0.1))


def test_a_filter_key_is_for_robomimic_files_only(file):
    with pytest.raises(DataError, match="filter_key is 'train', but only robomimic files have such keys, and this is D4RL's layout"):
        read_any(file, filter_key="train")
    with pytest.raises(DataError, match="filter_key is 'train'.* a Minari dataset"):
        read_any("minari:toy-v0", filter_key="train")


def test_a_robomimic_file(data_file):
    path = data_file("lift_ph_first10_low_dim.hdf5")
    read = read_any(path, action_range=(-1, 1))
    assert layout(path) == "robomimic" and (len(read.episodes), read.transitions, read.episodes[0].length) == (10, 531, 59)
    assert read.episodes[0].observations.shape[1] == 19 and read_any(path, max_transitions=100).transitions == 100


def test_a_catalogue_name(file, tmp_path, monkeypatch):
    """The name leads to the file in the data folder; a real file of the same name comes first."""
    monkeypatch.setenv("MODIP_DATA_DIR", str(tmp_path / "kept"))
    entry = cat.Entry("toy/a-v0", "http://127.0.0.1:9/a.hdf5", None, None, "none")
    for module in ("catalogue", "readers"):
        monkeypatch.setattr(f"modip_ray.tasks.{module}.catalogue", lambda: {"toy/a-v0": entry})
    path = cat.local_path("toy/a-v0")
    path.parent.mkdir(parents=True)
    path.write_bytes(file.read_bytes())
    assert read_any("toy/a-v0").source == str(path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "a-v0").write_bytes(file.read_bytes())
    assert read_any("toy/a-v0").source == "toy/a-v0"


@pytest.mark.parametrize(("source", "words"), [
    ("d4rl/hopper-medium-v2", "'d4rl/hopper-medium-v2' is no file, and not in the catalogue .did you mean 'd4rl/hopper_medium-v2'.*minari:<id>"),
    ("demonstrators", "'demonstrators' is no file, and not in the catalogue"),
    ("data/none.hdf5", "data/none.hdf5: no such file"), ("./none", "./none: no such file"), ("/none", "/none: no such file"),
    ("minari:nothing", "minari:nothing: is no Minari id"), ("", "is a folder; expected a file"),
])
def test_what_is_no_source_is_told(source, words):
    with pytest.raises(DataError, match=words):
        read_any(source)


def test_a_file_of_another_layout(tmp_path):
    with h5py.File(tmp_path / "other.hdf5", "w") as f:
        f["images"] = np.zeros(3)
    with pytest.raises(DataError, match="laid out neither as D4RL has it .* nor as robomimic has it .*; it has images"):
        read_any(tmp_path / "other.hdf5")
    (tmp_path / "page.hdf5").write_text("<html>")
    with pytest.raises(DataError, match="page.hdf5: cannot be read as HDF5"):
        read_any(tmp_path / "page.hdf5")
    with pytest.raises(DataError, match="is a folder; expected a file, e.g. .*other.hdf5"):
        read_any(tmp_path)
