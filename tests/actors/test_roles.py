"""What roles do between two calls, as plain objects: no Ray is started."""

import asyncio
import time
from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayTaskError, RuntimeEnvSetupError

from modip_ray.actors import evaluators as evaluators_module
from modip_ray.actors import pool as pool_module
from modip_ray.actors import supervisor as supervisor_module
from modip_ray.actors import system as system_module
from modip_ray.actors.evaluators import Evaluators
from modip_ray.actors.planner import PlannerActor, plan_server
from modip_ray.actors.pool import GONE, RolloutPool, Slot
from modip_ray.actors.pulse import Life, Pulse
from modip_ray.actors.rollout import Group, RolloutWorker
from modip_ray.actors.supervisor import Supervisor
from modip_ray.actors.system import RaySystem
from modip_ray.actors.watchdog import Watchdog
from modip_ray.cli import mendable
from modip_ray.learning.segment import SeenIds
from modip_ray.runfolder import RoleLost
from modip_ray.timing import Timer
from tests.fakes import small
from tests.learning.test_replay_server import segment


def test_no_evaluation_is_asked_for_before_the_last_one_is_reported():
    """Whoever asks puts the weights of that moment by as the best to be (log.keep_best), and takes the next score for theirs."""
    evaluators, answers = object.__new__(Evaluators), []
    evaluators.cfg, evaluators.asked, evaluators.finished = small(), None, []
    role = SimpleNamespace(group="evaluator", actor=SimpleNamespace(measure=SimpleNamespace(remote=lambda jobs: "asked")))
    evaluators.supervisor = SimpleNamespace(wait=lambda refs, wait_s: answers, roles={"evaluator 0": role})
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


def test_times_of_a_planner_that_does_not_answer_are_not_replaced_by_anothers(system, monkeypatch):
    system.said = {0: times(plan=10), 1: times(plan=4)}
    assert system.timings()["planner"] == (times(plan=14), 2)
    system.said = {0: None, 1: times(plan=5)}
    assert system.timings()["planner"] == (times(plan=15), 2)

    def get(ref):
        raise OutOfMemoryError("too full")
    monkeypatch.setattr(system_module.ray, "get", get)
    assert system.planner_statuses() == [], "killed by Ray's memory monitor"


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


def test_shards_take_turns_however_few_the_workers():
    """One worker, two shards: each gets every second sending, and the one that asks for it is waited for. A shard remembers one number of a sender, not all."""
    worker, sent, seen = object.__new__(RolloutWorker.__ray_metadata__.modified_class), [], {"a": SeenIds(), "b": SeenIds()}

    def shard(name):
        def add(segments):
            sent.append((name, segments))
            for s in segments:
                assert s.id not in seen[name] and s.incarnation == "aaaa"
                seen[name].add(s.id)
            return SimpleNamespace(may_collect=name != "b")
        return SimpleNamespace(name=name, add=SimpleNamespace(remote=add))
    worker.replays, worker.sent, worker.acks, worker.returns, worker.stored, worker.record = [shard("a"), shard("b")], 1, deque(), [], 0, None
    worker.get = lambda ack: ack
    group = Group(SimpleNamespace(take_episodes=list, name="0/aaaa.1"), (0, 1))
    for n in range(4):
        worker.send(group, [segment(2 * n, sender="0/aaaa.1"), segment(2 * n + 1, sender="0/aaaa.1")])
    assert [name for name, _ in sent] == ["b", "a", "b", "a"] and len({s.id for _, segments in sent for s in segments}) == 8
    assert [shard and shard.name for shard in (worker.take_ack() for _ in range(4))] == ["b", None, "b", None] and worker.stored == 24
    assert [s.dump() for s in seen.values()] == ['{"0/aaaa.1.s0": [4]}', '{"0/aaaa.1.s1": [4]}']
    worker.replays, alone = [shard("a")], segment(9, sender="1/aaaa")
    worker.send(group, [alone])
    assert sent[-1][1] == [alone], "as the collector named it"


def test_a_worker_asks_again_where_rays_memory_monitor_killed_the_planner():
    worker, group = object.__new__(RolloutWorker.__ray_metadata__.modified_class), SimpleNamespace(line=None, asked=False)
    worker.planner = SimpleNamespace(address=SimpleNamespace(remote=lambda: OutOfMemoryError("too full")))

    def get(error):
        raise error
    worker.get = get
    worker.ask(group)
    assert group.asked and group.line is None


class FakeEvaluator:
    """What EvaluatorActor's handle is: calls are answered at once, as `serves` says; `hangs`, `dies` and `broken` name what it has no answer to."""

    made: list                      # all of them, set by the fixture

    def __init__(self):
        self.serves, self.alive, self.heard, self.got, self.hangs, self.dies, self.broken = True, True, False, [], (), (), ()
        self.made.append(self)

    def __getattr__(self, method):
        if method not in ("ready", "run", "measure", "timing"):
            raise AttributeError(method)

        def remote(*items):
            self.got.append(method)
            self.alive = self.alive and method not in self.dies
            return Asked(self, method, items)
        return SimpleNamespace(remote=remote)

    def beat(self):
        if not self.serves or (self.heard and not self.alive):
            return None
        self.heard = True
        return Pulse(f"{self.made.index(self)}", 1, 1.0, 1, {}, {}, "")


class Asked:
    """A call's reference."""

    def __init__(self, actor, method, items):
        self.actor, self.method, self.items = actor, method, items

    def is_ready(self):
        return self.method in self.actor.broken or (self.actor.serves and self.actor.alive and self.method not in self.actor.hangs)

    def get(self):
        if self.method in self.actor.broken:
            raise ActorDiedError
        return SimpleNamespace(diagnostics={"by": self.actor}) if self.method == "measure" else (self.actor, *self.items)


@pytest.fixture
def evaluators(monkeypatch):
    """Evaluators of fake actors; all that were made, in `made`; all that were killed for good, in `killed`; `prepare`: called with each new one."""
    found, made, killed = object.__new__(Evaluators), [], []
    monkeypatch.setattr(FakeEvaluator, "made", made, raising=False)

    def start(name):
        found.prepare(name, actor := FakeEvaluator())
        return actor
    monkeypatch.setattr(evaluators_module.ray, "kill", lambda actor, no_restart=True: killed.append((actor, no_restart)))
    monkeypatch.setattr(evaluators_module.ray, "wait", lambda refs, num_returns=1, timeout=0: ([r for r in refs if r.is_ready()], []))
    monkeypatch.setattr(evaluators_module.ray, "get", lambda refs: [ref.get() for ref in refs] if isinstance(refs, list) else refs.get())
    monkeypatch.setattr(supervisor_module, "Heart", lambda actor, every_s: SimpleNamespace(
        every_s=every_s, silent_s=1.0, beat=lambda elapsed_s: actor.beat(), alive=lambda: actor.alive))
    monkeypatch.setattr(Life, "pulse", lambda self: Pulse("driver", 1, 1.0, 1, {}, {}, ""))
    monkeypatch.setattr(Watchdog, "look", lambda *args: None)
    cfg = small(resources__call_timeout_s=5.0, resources__restart_s=0.05)
    found.cfg, found.resources, found.asked, found.finished, found.give_up_at = cfg, {}, None, [], 0.0
    found.supervisor = Supervisor(cfg.resources, Timer())
    found.call, found.start, found.prepare, found.made, found.killed = found.supervisor.call, start, lambda name, actor: None, made, killed
    found.more({})
    found.supervisor.look()
    return found


def test_an_evaluation_that_hangs_is_given_up_for_good(evaluators, monkeypatch):
    """Ray would make the call again in the process that it starts for the one that was killed, before what is asked for next."""
    now = [0.0]
    monkeypatch.setattr(evaluators_module.time, "monotonic", lambda: now[0])
    evaluators.made[0].hangs = ("measure",)
    assert evaluators.request([]) and evaluators.busy()
    now[0] = 49.0
    assert not evaluators.request([]) and not evaluators.killed
    now[0] = 51.0
    assert not evaluators.busy() and evaluators.killed == [(evaluators.made[0], True)] and len(evaluators.made) == 2
    assert "given up after 50 s" in evaluators.supervisor.incidents[0]
    assert evaluators.request([]) and evaluators.made[1].got == ["measure"]
    assert len(evaluators.reports()) == 1
    evaluators.supervisor.look()
    assert not evaluators.supervisor.away and "evaluator 0 did not finish an evaluation within 50 s and was killed; it serves again" in (
        evaluators.supervisor.incidents[1])


@pytest.mark.parametrize("lost", ["dies", "broken"])
def test_what_a_lost_evaluator_had_another_does(evaluators, lost):
    """One dies with its job and no node has room for another; or it is dead for good. It is given up, and the scores are not lost."""
    def prepare(name, actor):
        setattr(actor, lost, ("run",))
        actor.serves = len(evaluators.made) == 2
    evaluators.prepare, told = prepare, []
    outcomes, diagnostics = evaluators.run_all(["a", "b", "c"], 2, told.append)
    assert sorted(job for _, job in outcomes) == ["a", "b", "c"] and outcomes == told and diagnostics == {"by": evaluators.made[0]}
    assert {actor for actor, _ in outcomes} == {evaluators.made[0]} and evaluators.made[1].got == ["ready", "run"]
    assert (evaluators.made[1], True) in evaluators.killed


def test_an_evaluator_is_given_up_where_another_serves_and_the_last_one_ends_the_run(evaluators):
    evaluators.more({})
    evaluators.supervisor.look()
    first, second = evaluators.made
    for actor in (first, second):
        actor.alive = False
        evaluators.supervisor.look()
        time.sleep(0.06)
        if actor is first:
            evaluators.supervisor.look()
            assert list(evaluators.actors) == ["evaluator 1"] and "others do its work" in evaluators.supervisor.incidents[0]
    with pytest.raises(RoleLost, match="evaluator 1 died and does not serve again since 0.05 s"):
        evaluators.supervisor.look()


@pytest.fixture
def pool(monkeypatch):
    """Of one slot, whose worker has not said hello; `pool.alive`: whether it has a process, `pool.now`: the clock."""
    pool = object.__new__(RolloutPool)
    pool.cfg, pool.slots, pool.retiring, pool.alone_since, pool.incidents, pool.lost = small(resources__call_timeout_s=5.0), [Slot(0)], [], 0.0, [], 0
    pool.supervisor, pool.alive, pool.now = SimpleNamespace(away=False, call=lambda refs, who: None), False, 100.0
    pool.slots[0].actor, pool.slots[0].hello, pool.slots[0].heard_at = "actor", "hello", 100.0
    monkeypatch.setattr(pool_module.ray, "wait", lambda refs, num_returns, timeout: ([], refs))
    monkeypatch.setattr(pool_module.ray, "kill", lambda actor: None)
    monkeypatch.setattr(pool_module.time, "monotonic", lambda: pool.now)
    monkeypatch.setattr(pool_module, "Heart", lambda actor, every_s: SimpleNamespace(alive=lambda: pool.alive))
    monkeypatch.setattr(pool, "fill", lambda slot: setattr(slot, "actor", "another"), raising=False)
    return pool


def test_a_worker_whose_environments_do_not_come_to_be_is_replaced_and_one_that_waits_for_room_is_not(pool):
    for pool.now in (106.0, 130.0, 1000.0):
        pool.gather()
    assert pool.slots[0].actor == "actor" and pool.slots[0].deaths == 0, "no node has room for it"
    pool.alive = True
    for pool.now in (1006.0, 1012.0):
        pool.gather()
    assert pool.slots[0].deaths == 1 and pool.slots[0].actor == "another"


@pytest.mark.parametrize("error", [OutOfMemoryError("too full"), RuntimeEnvSetupError("no such package")])
def test_a_worker_that_ray_gave_up_for_whatever_reason_is_replaced(pool, monkeypatch, error):
    def get(ref):
        raise error
    monkeypatch.setattr(pool_module.ray, "get", get)
    pool.take(pool.slots[0], "hello")
    assert pool.slots[0].actor is None and pool.slots[0].deaths == 1
    slot = pool.slots[0]
    slot.actor = SimpleNamespace(flush=SimpleNamespace(remote=lambda: "flush"))
    slot.member, pool.replays, pool.snapshots = SimpleNamespace(incarnation="a"), [], {}
    pool.supervisor.wait = lambda refs, timeout_s, num_returns, patient: refs
    pool.flush()
    assert slot.actor is None and "was lost while it sent its last segments" in pool.incidents[0]


def test_a_policy_that_diverges_is_an_error_that_the_command_line_says_in_one_line(pool, monkeypatch):
    def get(ref):
        raise RayTaskError("run", "", FloatingPointError("planner: the policy proposes actions that are not finite"), "", 1, "").as_instanceof_cause()
    monkeypatch.setattr(pool_module.ray, "get", get)
    with pytest.raises(mendable(), match="^planner: the policy proposes actions that are not finite$"):
        pool.take(pool.slots[0], "hello")


def test_a_slot_may_fail_as_often_as_it_likes_while_others_work(pool, monkeypatch):
    pool.slots[0].deaths = 2000
    pool.slots.append(Slot(1))
    pool.slots[1].member = "there"
    pool.drop(pool.slots[0], "died")
    assert pool.slots[0].fill_at == pool.now + pool_module.BACK_OFF_S
