import math

import numpy as np
import pytest
import torch

from modip_ray.learning.guard import WINDOW, DivergedError, UpdateGuard, extremes
from modip_ray.learning.learner import SKIPPED, mean_metrics
from modip_ray.learning.updater import Updater, largest, learner_state
from tests.learning.test_learner import draw, draw_chunks, linear_system, make_learner

DEVICE = torch.device("cpu")
ROUND = 4                                                           # learner.max_bad_updates of these tests


def judged(guard, norms, loss=1.0, start=0):
    return [float(guard(torch.tensor(loss), torch.tensor(float(n)), start + i)) for i, n in enumerate(norms)]


def updater(**settings):
    chosen = {"max_bad_updates": ROUND, "snapshot_every": 8, "max_roll_backs": 2, **settings}
    learner = make_learner(*(f"learner.{k}={v}" for k, v in chosen.items()))
    return Updater(learner.cfg, learner)


def batches(stream, buffer=None, seed=0):
    buffer, rng = buffer or linear_system(1), np.random.default_rng(seed)
    while True:
        yield draw(buffer, rng) if stream == "model" else draw_chunks(buffer, rng)


def spoilt(stream, value, seed=5):
    """A batch of which one number is not what it should be."""
    batch = next(batches(stream, seed=seed))
    batch["reward" if stream == "model" else "chunk"][0] = value
    return batch


def weights(learner, stream):
    return {k: v for k, v in learner_state(learner, [stream])[stream].items() if k not in ("updates", "rng", "guard", "streak", "value_guard")}


def assert_same(a, b):
    assert set(a) == set(b)
    for key, value in a.items():
        np.testing.assert_array_equal(value, b[key], err_msg=key)


def test_what_is_not_finite_is_bad_from_the_start():
    guard = UpdateGuard(10.0, DEVICE)
    assert judged(guard, [1, math.nan, math.inf, 1e30]) == [0, 1, 1, 0]
    assert judged(guard, [1], math.nan) == [1] and judged(guard, [1], math.inf) == [1]
    assert float(guard.skipped) == 4


def test_a_norm_explodes_beside_the_median_of_the_usual_ones():
    guard = UpdateGuard(10.0, DEVICE)
    usual = WINDOW // 2 + 1
    assert judged(guard, [2.0] * usual) == [0] * usual
    assert judged(guard, [19.9, 20.1, 1e9, 2.0], start=usual) == [0, 1, 1, 0]
    assert float(guard.streak) == 0
    judged(guard, [21, 22, 23], start=usual + 4)
    assert float(guard.streak) == 3 and float(guard.recent.median()) == 2.0         # what was skipped does not become usual
    guard.reset()
    assert float(guard.streak) == 0 and judged(guard, [1e9]) == [0]
    assert float(guard.skipped) == 5


def test_updates_without_a_gradient_say_nothing_of_what_is_usual():
    guard = UpdateGuard(10.0, DEVICE)
    assert judged(guard, [0.0] * 2 * WINDOW + [5.0]) == [0] * (2 * WINDOW + 1)


@pytest.mark.parametrize("stream, value", [("policy", math.nan), *(("model", v) for v in (math.nan, math.inf, 1e30, 1e6))])    # actions are clipped
def test_a_bad_batch_leaves_weights_and_moments_as_they_are(stream, value):
    up, source = updater(), batches(stream)
    for _ in range(WINDOW // 2 + 1):
        up.update(stream, next(source))
    before = {k: v for k, v in weights(up.learner, stream).items() if not k.startswith(("target_critic", "agent.policy"))}    # averages go on
    up.update(stream, spoilt(stream, value))
    assert_same(before, {k: weights(up.learner, stream)[k] for k in before})
    up.update(stream, next(source))
    after = weights(up.learner, stream)
    assert any(not np.array_equal(before[k], after[k]) for k in before) and all(np.isfinite(v).all() for v in after.values())
    metrics = up.take_metrics()
    assert metrics[f"guard/skipped_{stream}"] == 1 and all(math.isfinite(v) for v in metrics.values())
    assert up.count(stream) == WINDOW // 2 + 3 and not up.incidents


@pytest.mark.parametrize("stream", ["model", "policy"])
def test_bad_updates_in_a_row_lead_back_to_the_last_good_snapshot(stream):
    up, source = updater(), batches(stream)
    for _ in range(8):
        up.update(stream, next(source))
    kept = {k: v.copy() for k, v in weights(up.learner, stream).items()}
    assert up.snapshots[stream].count == 8
    for _ in range(2):
        up.update(stream, next(source))
    for _ in range(6):                                              # two of them before the check after update 12, which sees two in a row
        up.update(stream, spoilt(stream, math.nan))
    assert up.count(stream) == 16
    assert_same(kept, weights(up.learner, stream))
    [incident] = up.take_incidents()
    for part in (f"the {stream} learner skipped its last 6 updates, up to number 16", "grad_norm nan", "largest weight", "back to the weights of update 8",
                 "reward" if stream == "model" else "chunk", "not finite)"):
        assert part in incident
    assert not up.take_incidents()
    up.update(stream, next(source))
    assert up.count(stream) == 17 and up.take_metrics()[f"guard/skipped_{stream}"] == 6


def test_further_updates_of_v_that_are_all_skipped_lead_back_too():
    """Where targets grow for good, the world model's guard alone may take what V's calls an explosion; V would learn nothing any more."""
    learner = make_learner("learner.max_bad_updates=4", "learner.snapshot_every=8", "critic.updates_per_update=2")
    up, source = Updater(learner.cfg, learner), batches("model")
    for _ in range(8):
        up.update("model", next(source))
    learner.value_guard.recent.fill_(1e-9)                          # any gradient explodes beside that
    for _ in range(4):
        up.update("model", next(source))
    assert up.take_metrics()["guard/skipped_value"] == 4 and "back to the weights of update 8" in up.take_incidents()[0]
    for _ in range(4):
        up.update("model", next(source))
    assert up.take_metrics()["guard/skipped_value"] == 4 and not up.incidents


def test_weights_that_are_infinite_are_repaired():
    up, source = updater(), batches("model")
    for _ in range(8):
        up.update("model", next(source))
    with torch.no_grad():
        up.learner.agent.world_model.trunk[2].weight[0, 0] = torch.inf
    for _ in range(4):
        up.update("model", next(source))
    assert "largest weight inf" in up.take_incidents()[0]
    for _ in range(8):
        up.update("model", next(source))
    assert math.isfinite(largest(up.learner.agent.parameters())) and up.snapshots["model"].count == 16 and not up.incidents


def test_roll_backs_without_progress_end_the_run_with_what_was_seen():
    up, source = updater(max_roll_backs=2), batches("model")
    for _ in range(4):
        up.update("model", next(source))
    with pytest.raises(DivergedError, match=r"does not recover after 2 roll-backs .*reward .*not finite.*world_model.lr"):
        for _ in range(40):
            up.update("model", spoilt("model", math.inf))
    assert up.count("model") == 4 + 3 * ROUND and len(up.incidents) == 2


def test_progress_between_roll_backs_starts_their_count_anew():
    up, source = updater(max_roll_backs=1, snapshot_every=4), batches("model")
    for _ in range(3):
        for _ in range(ROUND):
            up.update("model", next(source))
        for _ in range(ROUND):
            up.update("model", spoilt("model", math.nan))
    assert len(up.incidents) == 3


def test_metrics_are_means_over_what_was_not_skipped():
    rows = [{"a": torch.tensor(a), SKIPPED: torch.tensor(s)} for a, s in ((1.0, 0.0), (math.nan, 1.0), (3.0, 0.0))]
    assert mean_metrics(rows) == {"a": 2.0} and mean_metrics(rows[1:2]) == {}


def test_extremes_by_hand():
    batch = {"obs": np.array([[1.0, np.nan], [-2.5, np.inf]]), "online": np.array([True, False]), "gain": np.full(3, np.nan)}
    assert extremes(batch) == "obs -2.5..1 (2 not finite), online 0..1, gain nothing finite (3 not finite)"
