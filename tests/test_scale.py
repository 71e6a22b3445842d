"""The model of a fleet against what can be worked out by hand, and what the fakes promise. (Against real actors: modip bench scale.)"""

import time

import numpy as np
import pytest

from modip_ray.bench.scale import MakeFake, MakeSleeping, prediction_table, predictions
from modip_ray.bench.scale_model import Fleet, predict
from modip_ray.config import load
from modip_ray.learning.collector import Query
from modip_ray.timing import Timer


def test_a_lone_worker_with_one_group_takes_turns_with_its_planner():
    fleet = Fleet(workers=1, envs_per_worker=4, groups=1, message_s=0.0)
    p = predict(fleet)
    assert p.steps_per_s == pytest.approx(4 / (4 * 0.005 + 0.010 + 4 * 0.00005), rel=0.03)
    assert p.rows_per_batch == 4 and p.answer_s == pytest.approx(0.0102)


def test_with_two_groups_a_worker_never_waits_where_a_step_takes_longer_than_a_plan():
    p = predict(Fleet(workers=1, envs_per_worker=16, groups=2, message_s=0.0))
    assert p.steps_per_s == pytest.approx(200, rel=0.03) and p.worker_busy == pytest.approx(1.0, abs=0.03) and p.rows_per_batch == 8


def test_two_groups_cannot_give_a_planner_more_than_half_of_the_environments_at_a_time():
    fleet = Fleet(workers=16, envs_per_worker=4)
    p = predict(fleet)
    assert p.steps_per_s == pytest.approx(fleet.loop_limit, rel=0.01) and p.rows_per_batch == pytest.approx(32, abs=1)
    assert fleet.loop_limit == pytest.approx(32 / 0.0116) and fleet.env_limit == 3200 and fleet.planner_limit == pytest.approx(64 / 0.0132)


def test_max_rows_bounds_a_planner_however_many_ask():
    p = predict(Fleet(workers=300, envs_per_worker=4, max_rows=128))
    assert p.rows_per_batch == 128 and p.steps_per_s == pytest.approx(128 / (0.010 + 128 * 0.00005), rel=0.02) and p.worker_busy < 0.2


def test_the_learner_holds_collection_back():
    p = predict(Fleet(workers=8, envs_per_worker=8, steps_per_s_learned=500.0))
    assert p.steps_per_s == pytest.approx(500) and p.saturated == "learner" and p.learner_busy == pytest.approx(1.0)


def test_more_planners_until_the_workers_are_busy():
    found = predictions([64], envs_each=4)
    assert [fleet.planners for fleet, _ in found][0] == 1 and found[-1][0].planners > 1
    assert found[0][1].steps_per_s < 0.85 * found[0][0].env_limit <= found[-1][1].steps_per_s
    head, *lines = prediction_table(found, 0.25).splitlines()
    assert len(lines) == len(found) and len({len(line) for line in (head, *lines)}) == 1


def test_the_fakes_take_the_time_they_say():
    env, fake = MakeSleeping(0.02)(), MakeFake(Fleet(1, 4, plan_s=0.03, row_s=0.001))(load(), 17, 6, 0.0, 0, Timer())
    env.reset()
    begun = time.perf_counter()
    env.step(np.zeros(6))
    between = time.perf_counter()
    planned = fake([Query((0, 0), "x", np.zeros((4, 17), np.float32), np.zeros(4, bool)), Query((1, 0), "y", np.zeros((2, 17), np.float32), np.zeros(2, bool))])
    assert between - begun >= 0.02 and time.perf_counter() - between >= 0.036
    assert [p.actions.shape for p in planned] == [(4, 1, 6), (2, 1, 6)] and planned[0].plans.shape == (4, 3, 6)
