import numpy as np
import pytest

from modip_ray.tasks.episode import Episode


def make(**changes):
    parts = {"observations": np.zeros((4, 2), np.float32), "actions": np.zeros((3, 1), np.float32), "rewards": np.array([1, 2, 4], np.float32)}
    return Episode(**{"terminated": False, **parts, **changes})


def test_length_and_return():
    assert make().validate().length == 3
    assert make().ret == 7.0


@pytest.mark.parametrize(("changes", "words"), [
    ({"observations": np.zeros((3, 2), np.float32)}, "3 rows, expected 4"),
    ({"observations": np.zeros(4, np.float32)}, r"observations must have 2 dimension\(s\)"),
    ({"actions": np.zeros((2, 1), np.float32)}, "actions have 2 rows, expected 3"),
    ({"actions": np.zeros((3, 1))}, "actions must be a float32 numpy array, got float64"),
    ({"rewards": [1.0, 2.0, 4.0]}, "rewards must be a float32 numpy array, got list"),
    ({"observations": np.zeros((1, 2), np.float32), "actions": np.zeros((0, 1), np.float32), "rewards": np.zeros(0, np.float32)}, "has no steps"),
    ({"rewards": np.array([1, np.nan, 0], np.float32)}, r"rewards\[1\] is nan"),
    ({"observations": np.array([[0, 0], [0, np.inf], [0, 0], [0, 0]], np.float32)}, r"observations\[1, 1\] is inf"),
])
def test_validate_names_what_is_wrong(changes, words):
    with pytest.raises(ValueError, match=words) as error:
        make(**changes).validate("episode 7")
    assert str(error.value).startswith("episode 7: ")
