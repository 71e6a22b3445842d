import subprocess
import sys

import numpy as np
import pytest

from modip_ray.learning.collector import Collector, Planned
from tests.fakes import STEPS, PointEnv

RNG = np.random.default_rng(0)


def planned(obs, chunk=1, horizon=4):
    plans = RNG.uniform(-1, 1, (len(obs), horizon, 2)).astype(np.float32)
    return Planned(plans[:, :chunk], plans, RNG.normal(size=len(obs)).astype(np.float32), 7)


@pytest.mark.parametrize("chunk", [1, 3])
def test_segments_hold_every_transition_once(chunk):
    seen: dict[int, list] = {}
    collector = Collector(PointEnv, 3, STEPS, segment_length=7, seed=1, name="w")

    def plan(obs, reset):
        p = planned(obs, chunk)
        for i in range(len(obs)):
            seen.setdefault(i, []).append((obs[i].copy(), p, bool(reset[i])))
        return p
    steps = sum(collector.step(plan) for _ in range(40))
    segments = collector.take_segments(flush=True)
    assert sum(len(s) for s in segments) == steps == collector.group.env_steps
    assert len({s.id for s in segments}) == len(segments) and all(s.id.startswith("w/") for s in segments)
    starts = {tuple(np.round(o, 6)) for calls in seen.values() for o, _, _ in calls}
    stored = {tuple(np.round(s.observations[t], 6)) for s in segments for t in range(len(s))}
    assert starts <= stored
    for s in segments:
        assert s.observations.shape == (len(s) + 1, 4) and s.plans.shape == (len(s), 4, 2)
        own = ~np.isnan(s.gains)
        assert np.array_equal(s.plans[own][:, 0], s.actions[own]), "a plan's first action is the one executed (nothing is clipped here)"
        assert not s.terminated, "time limits are no terminations"
    assert collector.take_segments(flush=True) == []


def test_a_cut_segment_ends_with_the_next_ones_first_observation():
    collector = Collector(PointEnv, 1, STEPS, segment_length=5, seed=1, name="w")
    for _ in range(10):
        collector.step(lambda obs, reset: planned(obs))
    a, b = collector.take_segments()
    assert len(a) == len(b) == 5 and np.array_equal(a.observations[-1], b.observations[0])


def test_termination_is_told_from_time_limit():
    collector = Collector(PointEnv, 1, 1000, segment_length=500, seed=1, name="w")
    push = np.ones((1, 4, 2), np.float32)
    while not (found := collector.take_segments()):
        collector.step(lambda obs, reset: Planned(push[:, :1], push, np.zeros(1, np.float32), 0))
    assert found[0].terminated and (np.abs(found[0].observations[-1, :2]) > 3).any()
    assert len(collector.take_episodes()) == 1


def test_environments_do_not_all_send_at_once():
    collector = Collector(PointEnv, 4, 100, segment_length=20, seed=1, name="w")
    sent = []
    for _ in range(20):
        collector.step(lambda obs, reset: planned(obs))
        sent.append(len(collector.take_segments()))
    assert max(sent) == 1 and sum(sent) == 4


def test_hook_changes_what_is_stored_and_not_its_name():
    """A hook that makes a segment anew and forgets its id: without one it could be stored twice."""
    def double(segment):
        return type(segment)(segment.observations, segment.actions, 2 * segment.rewards, segment.terminated, segment.plans, segment.gains)
    plain, hooked = (Collector(PointEnv, 1, STEPS, 5, 1, "w", hook) for hook in (None, double))
    actions = planned(np.zeros((1, 4)))
    for c in (plain, hooked):
        c.step(lambda obs, reset: actions)
    (before,), (after,) = (c.take_segments(flush=True) for c in (plain, hooked))
    assert np.allclose(2 * before.rewards, after.rewards) and before.id == after.id


def test_collecting_needs_no_torch_and_no_ray():
    code = "import sys\nfrom modip_ray.learning import collector, env_source, replay_server\nprint({'torch', 'ray'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"


def test_an_environment_that_fails_loses_nothing_but_its_failed_step():
    class Failing(PointEnv):
        steps = 0

        def step(self, action):
            self.steps += 1
            if self.steps % 8 == 0:
                raise RuntimeError("fell over")
            return super().step(action)
    collector = Collector(Failing, 2, STEPS, segment_length=100, seed=1, name="w", max_failures=100)
    steps = sum(collector.step(lambda obs, reset, chunk=chunk: planned(obs, chunk)) for chunk in [1, 3] * 20)
    segments, faults = collector.take_segments(flush=True), collector.take_faults()
    assert len(faults) >= 8 and not collector.take_faults() and "env 0: step failed with RuntimeError: fell over" in str(faults[0])
    assert sum(map(len, segments)) == steps == collector.group.env_steps and not any(s.terminated for s in segments)
    assert {len(s) for s in segments} >= {7} and max(map(len, segments)) == 7, "an episode's good part is one segment"
