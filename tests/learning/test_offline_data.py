"""Which data a run learns from, and what is refused."""
import numpy as np
import pytest

from modip_ray.learning.env_source import env_factory
from modip_ray.learning.offline_data import load_data, source_label
from modip_ray.tasks.d4rl_data import DataError, write_d4rl
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
