import math

import pytest
import torch

from modip_ray.config import Config, load
from modip_ray.learning.distill import imitation_weights

NAN = float("nan")
ONLINE = torch.tensor([False, False, True, True, True])
GAIN = torch.tensor([NAN, -5.0, 2.0, 0.1, NAN])
ADVANTAGE = torch.tensor([1.0, -1.0, 0.0, 0.6, 9.0])


def settings(executed=-1e9, **changes) -> Config:
    return load(overrides=[f"guard.min_gain={executed}", *(f"distill.{k}={v}" for k, v in changes.items())])


def test_predicted_leaves_out_plans_that_were_not_executed():
    assert weights(rule="predicted", min_gain=0.05, executed=0.2).tolist() == [1, 1, 1, 0, 0]
    assert weights(rule="predicted", min_gain=3.0, executed=0.2).tolist() == [1, 1, 0, 0, 0]


def weights(**changes):
    return imitation_weights(settings(**changes), ONLINE, GAIN, ADVANTAGE)


def test_all_counts_every_row_once():
    assert weights(rule="all").tolist() == [1, 1, 1, 1, 1]


@pytest.mark.parametrize("min_gain, expected", [(0.0, [1, 1, 1, 1, 0]), (0.5, [1, 1, 1, 0, 0]), (-1.0, [1, 1, 1, 1, 0])])
def test_predicted_keeps_offline_rows_and_plans_above_the_threshold(min_gain, expected):
    assert weights(rule="predicted", min_gain=min_gain).tolist() == expected


@pytest.mark.parametrize("min_gain, expected", [(0.0, [1, 0, 0, 1, 1]), (0.5, [1, 0, 0, 1, 1]), (0.7, [1, 0, 0, 0, 1]), (-2.0, [1, 1, 1, 1, 1])])
def test_realised_keeps_what_turned_out_better_offline_rows_too(min_gain, expected):
    assert weights(rule="realised", min_gain=min_gain).tolist() == expected


def test_exponential_by_hand():
    raw = [math.exp(2), math.exp(-2), 1.0, math.exp(1.2), 20.0]     # exp(18) is clipped at 20
    mean = sum(raw) / 5
    out = weights(rule="exponential", beta=2.0)
    torch.testing.assert_close(out, torch.tensor([r / mean for r in raw]))
    assert out.mean().item() == pytest.approx(1.0)


@pytest.mark.parametrize("min_gain, raw", [(0.0, [1.0, 0, 0, 0.6, 9.0]), (0.5, [0.5, 0, 0, 0.1, 8.5]), (-15.0, [16.0, 14.0, 15.0, 15.6, 20.0])])
def test_positive_by_hand(min_gain, raw):
    torch.testing.assert_close(weights(rule="positive", min_gain=min_gain), 5 * torch.tensor(raw) / sum(raw))


def test_where_nothing_was_better_than_expected_nothing_is_imitated():
    assert imitation_weights(settings(rule="positive"), ONLINE, GAIN, ADVANTAGE - 10).tolist() == [0] * 5


@pytest.mark.parametrize("rule", ["all", "predicted", "realised", "positive", "exponential"])
def test_weights_are_finite_floats_one_a_row(rule):
    out = weights(rule=rule)
    assert out.shape == (5,) and out.dtype == torch.float32 and torch.isfinite(out).all() and (out >= 0).all()
