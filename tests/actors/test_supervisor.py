import pytest
from ray.exceptions import OutOfMemoryError, RayTaskError, RuntimeEnvSetupError

from modip_ray.actors import pulse as pulse_module
from modip_ray.actors import supervisor as module
from modip_ray.actors.pulse import Heart, Life, Pulse
from modip_ray.actors.supervisor import HOPELESS, Supervisor
from modip_ray.actors.watchdog import AGAIN_S, STUCK_S, Usage, Watchdog
from modip_ray.config import load
from modip_ray.runfolder import RoleLost
from modip_ray.timing import Timer


def pulse(incarnation="a", waits=None, doing=None, pid=7, note=""):
    return Pulse(incarnation, pid, 100.0, 3, waits or {}, doing or {}, note)


class FakeHeart:
    """Answers as it is told."""

    def __init__(self):
        self.found, self.silent_s, self.is_alive = None, 0.0, True

    def beat(self, elapsed_s):
        found, self.found = self.found, None
        return found

    def alive(self):
        return self.is_alive


@pytest.fixture
def watched(monkeypatch, tmp_path):
    """A supervisor of one role whose heart is a fake; what it has Ray kill."""
    killed = []
    monkeypatch.setattr(module.ray, "kill", lambda actor, no_restart=True: killed.append((actor, no_restart)))
    monkeypatch.setattr(Life, "pulse", lambda self: pulse("driver", pid=1))
    s = Supervisor(load().resources, Timer(), tmp_path)
    s.add("the planner", "planner", "actor")
    heart = s.roles["the planner"].heart = FakeHeart()
    heart.found = pulse()
    s.look()
    return s, heart, killed


def test_a_dead_role_is_waited_for_and_said_once_it_serves_again(watched):
    s, heart, killed = watched
    assert s.processes() == {"driver": [1], "planner": [7]} and not s.away
    heart.silent_s, heart.is_alive = 1.0, False
    s.look()
    assert [role.name for role in s.away] == ["the planner"] and s.processes() == {"driver": [1]} and not killed
    heart.silent_s, heart.found = 0.0, pulse("b", note="from update 3 on")
    s.look()
    (line,) = s.take_incidents()
    assert line.startswith("the planner died; it serves again after 0.") and line.endswith(" s, from update 3 on")
    assert not s.away and s.restarts == {"planner": 1}


@pytest.mark.parametrize("error", [OutOfMemoryError("too full"), RuntimeEnvSetupError("no such package")])
def test_a_heart_takes_every_error_by_which_ray_says_that_an_actor_is_gone(monkeypatch, error):
    heart, answers = Heart(type("Actor", (), {"pulse": type("Call", (), {"remote": staticmethod(lambda: "asked")})}), 0.0), [error]

    def get(ref):
        raise answers[0]
    monkeypatch.setattr(pulse_module.ray, "wait", lambda refs, timeout: (refs, []))
    monkeypatch.setattr(pulse_module.ray, "get", get)
    assert heart.beat(1.0) is None and heart.beat(1.0) is error
    answers[0] = RayTaskError("pulse", "", ValueError("of the method itself"), "", 1, "")
    assert heart.beat(1.0) is None
    with pytest.raises(RayTaskError):
        heart.beat(1.0)


def test_a_role_that_rays_memory_monitor_kills_is_waited_for(watched):
    s, heart, killed = watched
    heart.found = OutOfMemoryError("too full")
    s.look()
    assert s.away and not killed
    heart.found = pulse("b")
    s.look()
    assert s.take_incidents()[0].startswith("the planner died (OutOfMemoryError); it serves again after 0.")
    heart.found = RuntimeEnvSetupError("no such package")
    with pytest.raises(RoleLost, match="the planner died and cannot be started again"):
        s.look()


def test_a_silent_role_is_killed_once_and_may_restart(watched):
    s, heart, killed = watched
    heart.silent_s = s.resources.silent_s / 2
    s.look()
    assert not s.away and not killed
    heart.silent_s = s.resources.silent_s + 1
    s.look()
    s.look()
    assert killed == [("actor", False)] and s.away[0].why == "did not answer for 15 s (resources.silent_s) and was killed"


def test_deaths_without_progress_end_the_run_and_with_progress_do_not(watched):
    s, heart, killed = watched
    for n in range(3 * HOPELESS):
        heart.silent_s, heart.is_alive = 1.0, False
        s.look()
        heart.silent_s, heart.is_alive, heart.found = 0.0, True, pulse(f"again {n}")
        s.look()
        s.progressed(0, n + 1, 0)
    with pytest.raises(RoleLost, match=f"the planner died {HOPELESS} times in a row without any progress"):
        for n in range(HOPELESS):
            s.progressed(0, 3, 0)
            heart.silent_s, heart.is_alive = 1.0, False
            s.look()
            heart.silent_s, heart.is_alive, heart.found = 0.0, True, pulse(f"in vain {n}")
            s.look()
    assert killed == [("actor", True)] and not s.roles


def test_a_role_that_does_not_come_back_ends_the_run(watched):
    s, heart, _ = watched
    heart.silent_s, heart.is_alive = 1.0, False
    s.look()
    s.roles["the planner"].away_since -= s.resources.restart_s + 1
    with pytest.raises(RoleLost, match="the planner died and does not serve again since 300 s"):
        s.look()


def test_the_watchdog_says_who_waits_for_whom_once_and_again_every_five_minutes():
    dog, learner, worker = Watchdog(), pulse("l", {"collection": 500.0, "replay": 9.0}), pulse("w", {"planner": 1.0})
    dog.progressed({"learner_model": {"the model learner": learner}, "rollout": {"rollout worker 0": worker}})
    later = {"learner_model": {"the model learner": learner._replace(waits={"collection": 558.0, "replay": 9.0})},
             "rollout": {"rollout worker 0": worker._replace(doing={"environments": 59.0, "wait/planner": 60.0})}}
    assert dog.look(STUCK_S - 1, later, {}) is None
    words = dog.look(2, later, {"the planner": "died 61 s ago"})
    assert words == ("no environment step and no update for 61 s: the planner died 61 s ago; the model learner waits for collection, 58 s by now; "
                     "rollout worker 0 is busy with environments since 59 s")
    assert dog.look(AGAIN_S - 2, later, {}) is None and dog.look(2, later, {}) is not None
    dog.progressed(later)
    assert dog.look(STUCK_S - 1, later, {}) is None


def test_usage_adds_up_processes_and_shares_waits_of_the_time_between():
    usage = Usage()
    usage.gauges({"rollout": {"0": pulse("a", {"planner": 5.0}), "1": pulse("b", {"planner": 2.0})}}, 100.0)
    found = usage.gauges({"rollout": {"0": pulse("a", {"planner": 9.0}), "1": pulse("c", {"planner": 2.0})}}, 110.0)
    assert found == {"rollout/rss_mb": 200.0, "rollout/refs": 6.0, "wait/rollout/planner": pytest.approx(0.2)}
