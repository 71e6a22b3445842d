import argparse
import hashlib

import h5py
import numpy as np
import pytest

from modip_ray.cli import data as data_cli
from modip_ray.config import ConfigError
from modip_ray.progress import ProgressLine
from modip_ray.runfolder import RunError
from modip_ray.tasks import catalogue as cat
from modip_ray.tasks import readers
from modip_ray.tasks.d4rl_data import read_d4rl, write_d4rl
from modip_ray.tasks.dataset import DataError
from modip_ray.tasks.episode import Episode


@pytest.fixture
def modip():
    """modip("data", ...) as the command line runs it; returns the exit status."""
    def run(*argv):
        parser = argparse.ArgumentParser()
        data_cli.add_parsers(parser.add_subparsers(dest="command"))
        args = parser.parse_args(["data", *map(str, argv)])
        return args.run(args)
    return run


@pytest.fixture
def episodes():
    rng = np.random.default_rng(0)

    def episode(steps, terminated):
        arrays = rng.normal(size=(steps + 1, 3)), rng.uniform(-1, 1, (steps, 2)), rng.normal(size=steps)
        return Episode(*(a.astype(np.float32) for a in arrays), terminated)
    return [episode(5, True), episode(4, False)]


@pytest.fixture
def file(tmp_path, episodes):
    write_d4rl(tmp_path / "data.hdf5", episodes, {"env": "Toy-v0"})
    return tmp_path / "data.hdf5"


@pytest.fixture
def toy(tmp_path, monkeypatch, file):
    """A catalogue whose one file is `file`, at an address where nobody listens."""
    monkeypatch.setenv("MODIP_DATA_DIR", str(tmp_path / "kept"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    content = file.read_bytes()
    entry = cat.Entry("toy/a-v0", "http://127.0.0.1:9/a-v0.hdf5", len(content), hashlib.sha256(content).hexdigest(), "confirmed")
    monkeypatch.setattr(cat, "catalogue", lambda: {"toy/a-v0": entry})
    monkeypatch.setattr("modip_ray.tasks.readers.catalogue", cat.catalogue)
    return entry


def place(content):
    path = cat.local_path("toy/a-v0")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def same(a, b):
    return a.terminated == b.terminated and all(np.array_equal(getattr(a, k), getattr(b, k)) for k in ("observations", "actions", "rewards"))


# ---- list, info ------------------------------------------------------------------------------------------------------------------------------

def test_list(modip, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("MODIP_DATA_DIR", str(tmp_path))
    assert modip("list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["name", "size", "checksum", "here"] and len(lines) == len(cat.catalogue()) + 3 and str(tmp_path) in lines[-1]
    modip("list", "hopper_medium-")
    assert capsys.readouterr().out.splitlines()[1].split() == ["d4rl/hopper_medium-v2", "152.8", "MB", "confirmed", "absent"]
    with pytest.raises(DataError, match="no name of the catalogue has 'xyz' in it"):
        modip("list", "xyz")


def test_list_says_what_is_here(modip, capsys, toy, file):
    path = place(file.read_bytes())
    modip("list")
    assert capsys.readouterr().out.splitlines()[1].endswith("confirmed  not checked")
    assert modip("verify", "toy/a-v0") == 0 and capsys.readouterr().out == "toy/a-v0: verified\n"
    modip("list")
    assert capsys.readouterr().out.splitlines()[1].endswith("  verified")
    path.write_bytes(b"half")
    modip("list")
    assert capsys.readouterr().out.splitlines()[1].endswith("  wrong size")


def test_info_of_a_file_and_of_a_name(modip, capsys, toy, file):
    assert modip("info", file) == 0
    out = capsys.readouterr().out
    assert "episodes" in out and "2  (1 terminated, 1 by" in out and "metadata/env" in out
    assert modip("info", "toy/a-v0") == 0                                                   # downloads nothing
    assert capsys.readouterr().out == f"toy/a-v0: absent; 'modip data download toy/a-v0' fetches {toy.facts()}\n"
    place(file.read_bytes())
    modip("info", "toy/a-v0")
    assert "2  (1 terminated" in capsys.readouterr().out
    with pytest.raises(DataError, match="'toy/a' is no file, and not in the catalogue .did you mean 'toy/a-v0'"):
        modip("info", "toy/a")


# ---- download, verify ------------------------------------------------------------------------------------------------------------------------

def test_download_without_a_network(modip, toy):
    with pytest.raises(DataError, match=rf"cannot be reached.*To place it by hand, save {toy.address} \(.* bytes, sha256 {toy.sha256}, confirmed\) as"):
        modip("download", "toy/a-v0")


def test_download_of_what_is_here(modip, capsys, toy, file):
    path = place(file.read_bytes())
    assert modip("download", "toy/a-v0") == 0 and capsys.readouterr().out == f"{path}  (verified)\n"


def test_verify(modip, capsys, toy, file, tmp_path):
    other = tmp_path / "a-v0.hdf5"
    write_d4rl(other, read_d4rl(file).episodes[:1], {})
    unknown = tmp_path / "unknown.hdf5"
    unknown.write_bytes(other.read_bytes())
    broken = tmp_path / "broken.hdf5"
    broken.write_bytes(other.read_bytes()[:-100])
    assert modip("verify", file, unknown) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"{file}: is toy/a-v0 (confirmed checksum)"
    assert out[1].startswith(f"{unknown}: not in the catalogue (sha256 ") and out[1].endswith("can be read: 1 episodes, 5 transitions")
    assert modip("verify", other, broken, "toy/a-v0", file) == 2                            # all are looked at, the last one too
    said = capsys.readouterr()
    assert said.out.count("is toy/a-v0") == 1
    for words in ("a-v0.hdf5: is named like toy/a-v0 but differs from it", "broken.hdf5: cannot be read as HDF5", "'modip data download toy/a-v0' fetches it"):
        assert words in said.err


def test_the_official_kitchen_file_is_recognised(modip, capsys, data_folder):
    kitchen = data_folder / "mini_kitchen_microwave_kettle_light_slider-v0.hdf5"
    assert modip("verify", kitchen) == 0 and capsys.readouterr().out == f"{kitchen}: is d4rl/kitchen_complete-v0 (confirmed checksum)\n"


@pytest.fixture
def data_folder():
    import os
    from pathlib import Path
    folder = Path(os.environ.get("MODIP_TEST_DATA", ""))
    if not (folder / "mini_kitchen_microwave_kettle_light_slider-v0.hdf5").is_file():
        pytest.skip("real data: set MODIP_TEST_DATA to a folder with the kitchen file")
    return folder


# ---- convert ---------------------------------------------------------------------------------------------------------------------------------

def test_convert_to_minari_and_back(modip, capsys, file, episodes, tmp_path, monkeypatch):
    pytest.importorskip("minari", reason="Minari datasets: pip install 'minari[hdf5]'")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    assert modip("convert", file, "minari:toy/back-v0") == 0 and "minari:toy/back-v0" in capsys.readouterr().out
    assert modip("convert", "minari:toy/back-v0", tmp_path / "back.hdf5") == 0
    assert "metadata/converted_from  minari:toy/back-v0" in capsys.readouterr().out
    read = read_d4rl(tmp_path / "back.hdf5")
    assert all(same(a, b) for a, b in zip(read.episodes, episodes, strict=True)) and read.metadata["minari_id"] == "toy/back-v0"
    assert modip("info", "minari:toy/back-v0") == 0
    with pytest.raises(DataError, match="exists already, and Minari does not overwrite"):
        modip("convert", file, "minari:toy/back-v0")
    with pytest.raises(DataError, match="the action space of Hopper-v4 is"):
        modip("convert", file, "toy/hopper-v0", "--to", "minari", "--env", "Hopper-v4")


def test_convert_refuses(modip, file, tmp_path):
    with pytest.raises(DataError, match="exists already; delete it"):
        modip("convert", file, file)
    with pytest.raises(DataError, match="names a Minari data set, but --to is d4rl"):
        modip("convert", file, "minari:a-v0", "--to", "d4rl")
    with pytest.raises(DataError, match="only a Minari data set records an environment"):
        modip("convert", file, tmp_path / "b.hdf5", "--env", "Hopper-v4")
    with pytest.raises(DataError, match="no such file"):
        modip("convert", tmp_path / "none.hdf5", tmp_path / "b.hdf5")


def test_what_cannot_be_written_is_said_before_anything_is_read(modip, file, tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "read_any", lambda *a, **k: pytest.fail("the source was read"))
    with pytest.raises(ConfigError, match="cannot be written, .* is no folder; give another name"):
        modip("convert", file, file / "below" / "x.hdf5")
    monkeypatch.setattr("os.access", lambda *a: False)
    with pytest.raises(ConfigError, match="x.hdf5: cannot be written, the rights are missing; give another name"):
        modip("convert", file, tmp_path / "x.hdf5")


def test_a_disk_that_fills_up_is_said(modip, file, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr("os.replace", full)
    with pytest.raises(RunError, match="x.hdf5: cannot be written .No space left on device.; make room or give access, and give the same command again"):
        modip("convert", file, tmp_path / "x.hdf5")


def test_convert_keeps_what_the_file_says(modip, file, tmp_path):
    modip("convert", file, tmp_path / "copy.hdf5")
    assert read_d4rl(tmp_path / "copy.hdf5").metadata == {"env": "Toy-v0", "converted_from": str(file)}


def test_a_file_without_time_limits_needs_one(modip, tmp_path, capsys):
    """Cut at 1000, which nothing in the file says, two episodes of 4 steps were one with a transition across the reset."""
    path, out = tmp_path / "v0.hdf5", tmp_path / "out.hdf5"
    with h5py.File(path, "w") as f:
        f["observations"], f["actions"] = np.arange(16.0).reshape(8, 2), np.zeros((8, 1))
        f["rewards"], f["terminals"] = np.zeros(8), np.zeros(8, bool)
    for argv in (("info", path), ("convert", path, out)):
        with pytest.raises(DataError, match="'timeouts' is missing.*--max-episode-steps N"):
            modip(*argv)
    assert modip("verify", path) == 2 and "--max-episode-steps" in capsys.readouterr().err and not out.exists()
    assert modip("info", path, "--max-episode-steps", 4) == modip("verify", path, "--max-episode-steps", 4) == 0
    assert modip("convert", path, out, "--max-episode-steps", 4) == 0
    assert [e.length for e in read_d4rl(out).episodes] == [3, 3]
    with pytest.raises(SystemExit):
        modip("info", path, "--max-episode-steps", 0)


# ---- the progress line -----------------------------------------------------------------------------------------------------------------------

def test_progress_in_a_log(capsys):
    line = ProgressLine("toy/a-v0")
    for done in range(0, 100_000_001, 1_000_000):
        line(done, 100_000_000)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11 and lines[0].startswith("toy/a-v0: 0 kB of 100.0 MB") and lines[-1] == "toy/a-v0: 100.0 MB of 100.0 MB (100 %)"


def test_progress_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    line = ProgressLine("toy/a-v0", every_s=0.0)
    line(50, 100)
    line(100, 100)
    assert capsys.readouterr().err == "\rtoy/a-v0: 0 kB of 0 kB (50 %)\033[K\rtoy/a-v0: 0 kB of 0 kB (100 %)\033[K\n"


def test_a_download_that_is_interrupted(modip, capsys, toy, monkeypatch):
    monkeypatch.setattr(cat, "fetch", lambda name, progress: (_ for _ in ()).throw(KeyboardInterrupt))
    assert modip("download", "toy/a-v0") == 130 and "the same command goes on with toy/a-v0" in capsys.readouterr().err
