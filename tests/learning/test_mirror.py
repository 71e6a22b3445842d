"""Checkpoints at another address, and a run's folder restored from there."""

import errno
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from modip_ray.cli import main
from modip_ray.config import ConfigError
from modip_ray.learning.checkpoint import CheckpointError, begin, commit, newest, write_state
from modip_ray.learning.mirror import Mirror, Mirroring
from modip_ray.report.metrics import read_metrics
from modip_ray.run import train
from modip_ray.runfolder import RunError, run_path, saved_config
from modip_ray.start import adopt
from tests.fakes import PointEnv, small, write_data


def checkpoint(run, step, **components):
    folder = begin(run / "checkpoints")
    for name, value in components.items():
        write_state(folder, name, {"x": np.full(1000, value, np.float32)})
    return commit(folder, {"env_steps": step, "updates": step}, keep=2)


@pytest.fixture(params=["folder", "fsspec"])
def address(request, tmp_path):
    return str(tmp_path / "there") if request.param == "folder" else f"memory://{tmp_path.name}"


def test_only_what_is_new_is_sent_and_old_checkpoints_go(address, tmp_path):
    run, mirror = tmp_path / "run", Mirror(address)
    assert mirror.pull(tmp_path / "empty") is None
    first = mirror.push(checkpoint(run, 1, bc=0, learner=1), run, keep=2)
    second = mirror.push(checkpoint(run, 2, bc=0, learner=2), run, keep=2)
    assert 8000 < first < 10000 and 4000 < second < 5500                            # of the second, bc is copied there
    mirror.push(checkpoint(run, 3, bc=0, learner=3), run, keep=2)
    assert [name[:14] for name in mirror.names()] == ["step_000000003", "step_000000002"]
    found = mirror.pull(tmp_path / "elsewhere")
    assert found.counters["env_steps"] == 3 and found.read("bc")["x"][0] == 0 and found.read("learner")["x"][0] == 3


def test_a_damaged_or_unfinished_one_there_is_passed_over(address, tmp_path):
    run, mirror = tmp_path / "run", Mirror(address)
    for step in (1, 2, 3):
        mirror.push(checkpoint(run, step, learner=step), run, keep=3)
    three, two, one = mirror.names()
    mirror.fs.delete_file(f"{mirror.root}/checkpoints/{three}/done")
    mirror.write(f"checkpoints/{two}/learner.safetensors", b"something else")
    assert mirror.pull(tmp_path / "elsewhere").path.name == one
    mirror.write(f"checkpoints/{one}/learner.safetensors", b"something else")
    with pytest.raises(CheckpointError, match="none of its checkpoints"):
        mirror.pull(tmp_path / "nowhere")


def test_a_first_sending_that_was_cut_short_is_no_checkpoint(address, tmp_path):
    run, mirror = tmp_path / "run", Mirror(address)
    mirror.push(checkpoint(run, 1, learner=1), run, keep=3)
    mirror.fs.delete_file(f"{mirror.root}/checkpoints/{mirror.names()[0]}/done")
    assert mirror.pull(tmp_path / "elsewhere") is None


def test_a_checkpoint_that_cannot_be_sent_is_said_and_the_next_is_tried(tmp_path):
    run, sending = tmp_path / "run", Mirroring(str(tmp_path / "there"), tmp_path / "run", 2)
    (tmp_path / "there").write_text("a file is in the way")
    sending.offer(checkpoint(run, 1, learner=1))
    sending.sending.exception()
    assert "could not be sent" in sending.problem() and sending.problem() is None
    (tmp_path / "there").unlink()
    checkpoint(run, 2, learner=2)
    assert sending.finish() is None and [name[:14] for name in sending.mirror.names()] == ["step_000000002"]


@pytest.mark.parametrize("value, words", [("nonsense://x/y", "got 'nonsense://x/y'"), ("s3://key:secret@bucket/x", "has credentials in it"),
                                          ("/proc/nowhere", "cannot be written")])
def test_an_address_that_cannot_be_used_is_said_before_anything_starts(value, words, tmp_path):
    with pytest.raises(ConfigError, match="log.mirror: ") as error:
        train(small(run_dir=str(tmp_path / "run"), log__mirror=value), PointEnv)
    assert words in str(error.value) and not (tmp_path / "run" / "checkpoints").exists()


def test_the_home_folder_of_runs_starts_and_mirrors(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    cfg = small(run_dir="~/run", pretrain__start="~/start")
    assert run_path(cfg) == tmp_path / "run" and cfg.run_dir == "~/run" and Mirror("~/there").root == str(tmp_path / "there")
    with pytest.raises(RunError, match=f"^{tmp_path}/start: has no checkpoint"):
        adopt(SimpleNamespace(cfg=cfg), tmp_path / "run" / "checkpoints")
    assert run_path(small(run_dir="~no_such_user/run")) == Path("~no_such_user/run")


def test_a_mirror_that_fails_on_the_way_is_said(tmp_path, monkeypatch, capsys):
    def fails(self, *args):
        raise OSError("connection reset")
    monkeypatch.setattr(Mirror, "names", fails)
    with pytest.raises(SystemExit) as ended:
        main(["restore", str(tmp_path / "there"), str(tmp_path / "run")])
    assert ended.value.code == 2 and "connection reset" in capsys.readouterr().err


@pytest.mark.parametrize("number, words", [(errno.ENOSPC, "No space left on device"), (errno.EROFS, "Read-only file system")])
def test_what_cannot_be_written_here_is_not_laid_to_the_mirror(tmp_path, monkeypatch, capsys, number, words):
    def fails(self, *args):
        raise OSError(number, words, str(self))
    run, there = tmp_path / "run", str(tmp_path / "there")
    Mirror(there).push(checkpoint(run, 1, learner=1), run, keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", fails)
        with pytest.raises(SystemExit, match="2"):
            main(["restore", there, str(tmp_path / "fetched")])
    assert f": cannot be written ({words}); make room or give access, and give the same command again" in capsys.readouterr().err
    for at, code, told in (("fetched", 0, "step_000000001"), ("run/config.yaml/x", 2, "is no folder; give another name")):
        (run / "config.yaml").touch()
        with pytest.raises(SystemExit, match=str(code)):
            main(["restore", there, str(tmp_path / at)])
        assert told in "".join(capsys.readouterr())


def test_a_lost_run_folder_is_restored_and_the_run_goes_on(tmp_path, capsys):
    run, there = tmp_path / "run", tmp_path / "there"

    def settings(steps):
        return small(run_dir=str(run), serial=True, data__source=str(write_data(tmp_path / "data.hdf5")), log__mirror=str(there), online__env_steps=steps)
    before = train(settings(60), PointEnv)
    shutil.rmtree(run)
    assert train(settings(60), PointEnv)["scores"] == before["scores"]              # finished: its summary came back
    shutil.rmtree(run)
    assert train(settings(120), PointEnv)["env_steps"] == 120
    assert [row["env_steps"] for row in read_metrics(run) if row["kind"] == "resume"] == [60] and newest(run / "checkpoints").counters["env_steps"] == 120
    shutil.rmtree(run)
    Mirror(str(there)).pull(run)
    (run / "config.yaml").unlink()                                                  # as if killed before the last file was there
    assert train(settings(120), PointEnv)["env_steps"] == 120
    for code, expected in ((0, str(tmp_path / "fetched")), (2, "is there already")):
        with pytest.raises(SystemExit) as ended:
            main(["restore", str(there), str(tmp_path / "fetched")])
        assert ended.value.code == code and expected in "".join(capsys.readouterr())
    assert saved_config(tmp_path / "fetched") == settings(120)
    shutil.rmtree(run)
    with pytest.raises(ConfigError, match="was started with other settings"):
        train(settings(120).replace({"critic.gamma": 0.5}), PointEnv)
