"""What roles do between two calls, as plain objects: no Ray is started."""

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest

from modip_ray.actors import system as system_module
from modip_ray.actors.evaluators import Evaluators
from modip_ray.actors.planner import PlannerActor, plan_server
from modip_ray.actors.pool import GONE, RolloutPool
from modip_ray.actors.system import RaySystem
from modip_ray.timing import Timer
from tests.fakes import small


def test_no_evaluation_is_asked_for_before_the_last_one_is_reported():
    """Whoever asks puts the weights of that moment by as the best to be (log.keep_best), and takes the next score for theirs."""
    evaluators, answers = object.__new__(Evaluators), []
    evaluators.asked, evaluators.finished = None, []
    evaluators.actors = [SimpleNamespace(measure=SimpleNamespace(remote=lambda jobs: "asked"))]
    evaluators.supervisor = SimpleNamespace(wait=lambda refs, wait_s: answers)
    evaluators.call = lambda refs, who: list(refs)
    assert evaluators.request([]) and not evaluators.request([])
    answers.append("report")
    assert not evaluators.request([]), "it is there, and nobody has taken it"
    assert evaluators.reports() == ["report"] and evaluators.request([])


def planner_with(newer):
    """A planner whose store answers as `newer` does, and what its queue got: for each query, the weights that were there by then."""
    planner, got = object.__new__(PlannerActor.__ray_metadata__.modified_class), []
    planner.cfg = small(planner__weights_every_s=60.0)
    planner.store = SimpleNamespace(newer=SimpleNamespace(remote=newer))
    planner.server = SimpleNamespace(pending=None)
    planner.versions, planner.pulling, planner.pulled_at = {}, None, float("-inf")

    async def submit(client, query, rows):
        got.append((client[0], sorted(planner.server.pending[0]) if planner.server.pending else []))
    planner.queue = SimpleNamespace(submit=submit)
    return planner, got


@pytest.mark.parametrize("queries", [1, 3])
def test_every_query_waits_for_the_first_weights(queries):
    async def newer(versions):
        await asyncio.sleep(0.05)
        return {"agent": (0, np.zeros(1)), "bc": (0, np.zeros(1)), "model": (3, np.zeros(1))}, 7
    planner, got = planner_with(newer)

    async def ask():
        await asyncio.gather(*(planner.plan(SimpleNamespace(worker=i, incarnation="a", obs=np.zeros((2, 4)))) for i in range(queries)))
    asyncio.run(ask())
    assert got == [(i, ["agent", "model"]) for i in range(queries)] and planner.versions == {"agent": 0, "model": 3}


def test_first_weights_that_do_not_come_are_an_error_of_every_query():
    async def newer(versions):
        raise ConnectionError("the store is gone")
    planner, got = planner_with(newer)

    async def ask():
        query = SimpleNamespace(worker=0, incarnation="a", obs=np.zeros((2, 4)))
        return await asyncio.gather(planner.plan(query), planner.plan(query), return_exceptions=True)
    assert [type(found) for found in asyncio.run(ask())] == [ConnectionError] * 2 and got == []


def times(**counts) -> dict:
    return {"seconds": {name: 0.5 * n for name, n in counts.items()}, "counts": counts}


@pytest.fixture
def system(monkeypatch):
    """A system of two planners, a replay and two learners; tests set the planners' times, None where one does not answer, in `system.said`."""
    found = object.__new__(RaySystem)
    found.said, found.snapshots, found.timer, found.pool = {0: times(), 1: times()}, {}, Timer(), None
    found.planners = [SimpleNamespace(status=SimpleNamespace(remote=lambda i=i: i)) for i in found.said]
    found.replay_status = lambda: {"timings": [times(sample=3)]}
    found.evaluators = SimpleNamespace(timings=dict)
    monkeypatch.setattr(system_module.ray, "wait", lambda refs, num_returns, timeout: ([r for r in refs if found.said[r] is not None], []))
    monkeypatch.setattr(system_module.ray, "get", lambda ref: {"timing": found.said[ref]})
    return found


def test_times_of_a_planner_that_does_not_answer_are_not_replaced_by_anothers(system):
    system.said = {0: times(plan=10), 1: times(plan=4)}
    assert system.timings()["planner"] == (times(plan=14), 2)
    system.said = {0: None, 1: times(plan=5)}
    assert system.timings()["planner"] == (times(plan=15), 2)


def test_the_sums_of_a_role_do_not_fall_where_one_of_its_processes_begins_anew(system):
    for said, total in (((10, 4), 14), ((2, 5), 17), ((3, 6), 19), ((1, 0), 20), ((1, 1), 21)):
        system.said = {i: times(plan=n) for i, n in enumerate(said)}
        assert system.timings()["planner"] == (times(plan=total), 2), said
    system.said = {0: times(plan=1, load=1), 1: times(load=20)}                         # more in all, and yet another process
    assert system.timings()["planner"] == (times(plan=21, load=21), 2)
    for stream, n, total in (("model", 7, 7), ("policy", 3, 10), ("model", 2, 12), ("policy", 4, 13)):
        system.remember("learner", {stream: times(update=n)})
        assert system.timings()["learner"][0] == times(update=total)
    assert system.timings()["learner"][1] == 2 and system.timings()["replay"] == (times(sample=3), 1)


def test_lost_rollout_workers_are_no_process(system):
    pool = object.__new__(RolloutPool)
    pool.snapshots = {"a": times(step=5), GONE: times(step=7)}
    system.pool = pool
    assert system.timings()["rollout"] == (times(step=12), 1)


def test_a_planner_that_begins_anew_draws_other_noise():
    seeds = {plan_server(small(), 4, 2, 0.0, 0, Timer()).planner.rng.initial_seed() for _ in range(3)}
    assert len(seeds) == 3
