"""Offline data on the disk are the offline data in memory, bit for bit, and cannot be written to."""

import errno
import os

import numpy as np
import pytest

from modip_ray.config import ConfigError
from modip_ray.learning.build import build_spec
from modip_ray.learning.offline_rows import in_memory, mapped, write_rows
from modip_ray.learning.replay_server import build_replay
from modip_ray.tasks.collect import collect
from tests.fakes import STEPS, Noisy, PointEnv, small

EPISODES = collect(Noisy(), PointEnv, 300, STEPS, seed=0, num_envs=4)
LOW, HIGH = -np.ones(2), np.ones(2)


@pytest.mark.parametrize("shards", [1, 3])
def test_rows_on_the_disk_are_those_in_memory(tmp_path, shards):
    for path, i in zip(write_rows(EPISODES, 0.9, shards, tmp_path), range(shards), strict=True):
        there, here = mapped(path, 0.9), in_memory(EPISODES[i::shards], 0.9)
        assert (there.size, there.total) == (here.size, here.total)
        start = np.arange(here.size)
        one, two = there.chunks(start, 4, 3, planned=False), here.chunks(start, 4, 3, planned=False)
        assert one.keys() == two.keys() and all(np.array_equal(one[k], two[k], equal_nan=one[k].dtype.kind == "f") for k in two)
        with pytest.raises(ValueError, match="read-only"):
            there.arrays["reward"][0] = 1.0


def test_the_agent_and_the_batches_are_the_same(tmp_path):
    cfg = small()
    rows = write_rows(EPISODES, cfg.critic.gamma, 1, tmp_path)
    assert np.array_equal(build_spec(cfg, rows, LOW, HIGH).weights, build_spec(cfg, EPISODES, LOW, HIGH).weights)
    one, two = (build_replay(cfg, data).sample("model") for data in (rows, EPISODES))
    assert all(np.array_equal(one[k], two[k]) for k in two)


def test_a_process_that_maps_the_old_rows_keeps_them(tmp_path):
    old = mapped(write_rows(EPISODES, 0.9, 1, tmp_path)[0], 0.9)
    before = old.steps.copy()
    write_rows(EPISODES[:2], 0.9, 1, tmp_path)
    assert np.array_equal(old.steps, before) and sorted(p.name for p in tmp_path.iterdir()) == ["rows_0_of_1.ends.npy", "rows_0_of_1.npy"]


def test_a_full_disk_is_an_error_before_anything_is_written_and_leaves_the_old_rows(tmp_path, monkeypatch):
    """Through memory it would be a bus error."""
    write_rows(EPISODES, 0.9, 1, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left on device.*rows_0_of_1") as error:
        write_rows(EPISODES[:2], 0.9, 1, tmp_path)
    assert error.value.errno == errno.ENOSPC and {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_what_cannot_be_is_said(tmp_path):
    with pytest.raises(ConfigError, match=r"replay.shards: got 99, but the data have \d+ episode"):
        write_rows(EPISODES, 0.9, 99, tmp_path)
    with pytest.raises(ConfigError, match="run_dir: .*rows_0_of_1.npy cannot be read"):
        mapped(tmp_path / "rows_0_of_1.npy", 0.9)
