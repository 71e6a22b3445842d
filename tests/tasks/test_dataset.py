import numpy as np
import pytest

from modip_ray.tasks.dataset import DataError, Dataset, describe, statistics
from modip_ray.tasks.episode import Episode


def episode(steps, terminated, action=0.5):
    return Episode(np.arange(2 * (steps + 1), dtype=np.float32).reshape(-1, 2), np.full((steps, 1), action, np.float32), np.ones(steps, np.float32), terminated)


def test_statistics_by_hand():
    s = statistics(Dataset([episode(2, True, -0.25), episode(4, False)], "here"))
    assert (s["episodes"], s["transitions"], s["terminated"], s["obs_dim"], s["action_dim"]) == (2, 6, 1, 2, 1)
    assert s["return"] == {"mean": 3.0, "std": 1.0, "min": 2.0, "max": 4.0} and s["length"]["max"] == 4
    assert (s["action_low"], s["action_high"], s["obs_high"]) == ([-0.25], [0.5], [8.0, 9.0])


def test_describe_is_an_aligned_table():
    text = describe(Dataset([episode(2, True)], "here", {"algorithm": "SAC"}, ("something was cut",)))
    lines = text.splitlines()
    assert "transitions         2" in lines and "metadata/algorithm  SAC" in lines and "note                something was cut" in lines


def test_empty_dataset_is_refused():
    with pytest.raises(DataError, match="holds no episode"):
        describe(Dataset([], "here"))
