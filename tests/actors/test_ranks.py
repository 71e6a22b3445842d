"""Learners of two processes each: the same result as one, and one of them killed in the course of a run."""

import os
import signal

import numpy as np
import pytest
import ray

from modip_ray.config import ConfigError
from modip_ray.learning.build import build_spec
from modip_ray.learning.checkpoint import begin, commit, newest
from modip_ray.learning.serial import SerialSystem
from modip_ray.learning.system import Setup
from modip_ray.tasks.collect import collect
from tests.advance import advance_until
from tests.fakes import STEPS, Noisy, PointEnv, small

pytestmark = pytest.mark.ray
OFFLINE = 20


def setup(folder=None, **dotted) -> Setup:
    cfg = small(folder, **{"pretrain__updates": OFFLINE, "pretrain__policy_updates": OFFLINE, "online__env_steps": 100_000, "online__min_online": 30,
                           "rollout__num_workers": 1, "resources__snapshot_s": 0.3, **dotted})
    episodes = collect(Noisy(), PointEnv, 600, STEPS, seed=0, num_envs=4)
    return Setup(cfg, build_spec(cfg, episodes, -np.ones(2), np.ones(2)), episodes, PointEnv, folder=folder)


def ahead(system, updates):
    counts = dict(system.counts)
    return lambda *_: all(system.counts[s] >= n + updates for s, n in counts.items())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    from modip_ray.actors.system import RaySystem
    folder, facts = tmp_path_factory.mktemp("run"), {}
    system = RaySystem(setup(folder, resources__learner_replicas=2))
    try:
        advance_until(system, "pretrain", lambda *_: system.counts == {"model": OFFLINE, "policy": OFFLINE})
        system.freeze_bc()
        facts["offline"] = {s: ray.get(learner.weights.remote()) for s, learner in system.learners.items()}
        advance_until(system, "online", ahead(system, 10))
        advance_until(system, "online", lambda *_: all(len(system.processes().get(f"learner_{s}", [])) == 2 for s in ("model", "policy")))
        facts["processes"] = system.processes()
        os.kill(facts["processes"]["learner_model"][1], signal.SIGKILL)
        _, facts["incidents"] = advance_until(system, "online", lambda _, found: any("the model learner died; it serves again" in line for line in found))
        advance_until(system, "online", ahead(system, 10))
        advance_until(system, "online", lambda *_: len(system.processes().get("learner_model", [])) == 2)
        facts["processes after"], facts["gauges"] = system.processes(), system.gauges()
        part = begin(folder / "checkpoints")
        facts["saved"] = system.save(part)
        commit(part, {"phase": "online", **facts["saved"]}, 2)
        facts["checkpoint"] = newest(folder / "checkpoints")
    finally:
        system.close()
    return facts


def test_offline_training_ends_where_one_process_does(run):
    serial = SerialSystem(setup())
    while not serial.advance("pretrain", 1.0, until=0).done:
        pass
    for stream, weights in run["offline"].items():
        np.testing.assert_allclose(weights, serial.learner.agent.flat(stream), atol=1e-4, rtol=0)


def test_where_one_process_is_killed_the_whole_learner_begins_again_from_its_snapshot(run):
    before, after = run["processes"]["learner_model"], run["processes after"]["learner_model"]
    assert len(before) == len(after) == 2 and not set(before) & set(after)
    assert all(not os.path.exists(f"/proc/{pid}") or open(f"/proc/{pid}/stat").read().split()[2] == "Z" for pid in before)
    assert any("(its snapshot)" in line for line in run["incidents"] if "serves again" in line), run["incidents"]
    assert run["gauges"]["learner_model/restarts"] == 1.0 and run["processes after"]["learner_policy"] == run["processes"]["learner_policy"]


def test_a_checkpoint_is_of_the_updates_that_were_made(run):
    """By rank 0, as a learner of one process writes it; that all ranks begin from such a state, the killed learner shows."""
    saved = {stream: int(run["checkpoint"].read(f"learner_{stream}")["updates"]) for stream in ("model", "policy")}
    assert saved == {"model": run["saved"]["updates"], "policy": run["saved"]["policy_updates"]} and min(saved.values()) > OFFLINE


@pytest.mark.parametrize("dotted, message", [({"serial": True}, "must be 1 in serial mode"), ({"policy__batch_size": 33}, "must divide policy.batch_size=33")])
def test_settings_that_cannot_be_shared_out_are_refused(dotted, message):
    with pytest.raises(ConfigError, match=f"resources.learner_replicas: got 2, {message}"):
        small(resources__learner_replicas=2, **dotted)
