"""Phases and their time, and when evaluations are due: `Session` without a system."""

from types import SimpleNamespace

import pytest

from modip_ray import session
from modip_ray.config import load
from modip_ray.learning.evaluation import Job, Outcome
from modip_ray.learning.system import Report, Status
from modip_ray.session import PhaseClock, Session


def test_a_phase_inside_another_one_is_no_part_of_its_time(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(session.time, "monotonic", lambda: now[0])
    timed = PhaseClock({"online": 10.0})
    with pytest.raises(KeyError), timed("online"):
        now[0] += 1
        with timed("evaluation"):
            now[0] += 5
            assert timed.count() == {"online": 11.0, "evaluation": 5.0}
        now[0] += 2
        raise KeyError
    now[0] += 50
    with timed("evaluation"):
        now[0] += 1
    assert timed.count() == {"online": 13.0, "evaluation": 6.0}


@pytest.mark.parametrize("every, saved, env_steps, due", [
    (100, 0, 0, 100), (100, 100, 90, 100), (100, 300, 250, 300),
    (100, 100, 130, 100),               # its report had not come when the checkpoint was written: it is made again
    (0, 100, 90, 0),                    # evaluations were turned off since
    (100, 0, 250, 300),                 # ... turned on
    (50, 300, 210, 250), (1000, 300, 210, 300)])                                    # ... made more often, less often: the one that was due stays
def test_an_evaluation_is_due_by_the_settings_and_the_steps_of_now(every, saved, env_steps, due):
    own = object.__new__(Session)
    own.cfg, own.next_eval, own.status = load(overrides=[f"eval.every_steps={every}"]), saved, Status(env_steps, 0, 0, False)
    own.schedule_evaluation()
    assert own.next_eval == due


def test_a_checkpoint_says_that_an_evaluation_under_way_is_due_until_its_report_is_there(tmp_path, monkeypatch):
    """As under Ray: asked for at one step, reported later; a checkpoint between the two must have a resumed run repeat it."""
    saved = []
    monkeypatch.setattr(session, "begin", lambda root: tmp_path)
    monkeypatch.setattr(session, "commit", lambda folder, counters, keep: saved.append(counters["next_eval"]) or folder)
    own = object.__new__(Session)
    own.cfg = load(overrides=["eval.every_steps=100", "log.keep_best=false"])
    own.folder, own.stop = SimpleNamespace(checkpoints=tmp_path), session.StopSignals(0)
    own.system = SimpleNamespace(request_evaluation=lambda jobs: True, save=lambda folder: {}, timings=dict)
    own.log, own.progress, own.mirror = SimpleNamespace(write=lambda row: None), SimpleNamespace(scores=lambda **s: None), None
    own.timed, own.pending, own.phase, own.unreported, own.next_eval, own.status = PhaseClock({}), [], "online", None, 100, Status(110, 0, 0, False)
    assert own.request_evaluation([Job("mpc", (1,))])
    own.next_eval = 200
    own.save()
    own.record([Report(110, 0, [], {})])                                            # diagnostics alone: of a request without jobs
    own.save()
    own.record([Report(110, 0, [Outcome(Job("mpc", (1,)), {"return": [1.0]}, [5])], {})])
    own.save()
    assert saved == [100, 100, 200]
