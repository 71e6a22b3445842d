"""The roles on a real (small, private) Ray. One GPU is declared that does not exist: scheduling is tested, computing falls back to the CPU."""

import contextlib
import dataclasses
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import ray
import torch

from modip_ray.config import ConfigError
from modip_ray.learning.build import agent_of, build_spec
from modip_ray.learning.evaluation import jobs_for
from modip_ray.learning.serial import SerialSystem
from modip_ray.learning.system import Setup
from modip_ray.tasks.collect import collect
from modip_ray.tasks.envs import EnvError
from tests.advance import PATIENCE_S, advance_until
from tests.fakes import STEPS, Noisy, PointEnv, small
from tests.private_ray import private_ray

pytestmark = pytest.mark.ray
STEPS_ONLINE = 1000


@pytest.fixture(scope="module")
def cluster():
    with private_ray(num_gpus=1):
        yield


def setup(slow=Path("/no/such/file"), **dotted) -> Setup:
    cfg = small(**{"pretrain__updates": 20, "pretrain__policy_updates": 20, "online__env_steps": STEPS_ONLINE, **dotted})
    episodes = collect(Noisy(), PointEnv, 600, STEPS, seed=0, num_envs=4)
    return Setup(cfg, build_spec(cfg, episodes, -np.ones(2), np.ones(2)), episodes, local_env_class(slow))


def local_env_class(slow):
    """A class that no other process can import, like one of a notebook: it must travel with cloudpickle. While the file is there its steps do not run out."""
    class Local(PointEnv):
        def step(self, action):
            time.sleep(0.3 if slow.exists() else 0)
            return super().step(action)
    return Local


def error_of_an_environment(system) -> EnvError:
    """What the driver raises where the environments of the same planners, learners and replay fail."""
    class Broken(PointEnv):
        def step(self, action):
            raise RuntimeError("the arm is stuck")
    setup, cfg = system.setup, system.cfg
    system.pool.close()
    system.cfg = cfg.replace({"online.env_steps": 2 * STEPS_ONLINE})
    system.pool, system.setup = None, dataclasses.replace(setup, cfg=system.cfg, env_factory=Broken)
    with pytest.raises(EnvError) as error:
        advance_until(system, "online")
    system.cfg, system.setup = cfg, setup
    return error.value


@pytest.fixture(scope="module")
def run(cluster, tmp_path_factory):
    """A whole small run on Ray with the planner on a declared GPU, in the course of which a rollout worker is killed."""
    from modip_ray.actors.system import RaySystem
    slow = tmp_path_factory.mktemp("gate") / "slow"                                 # until the killed worker is replaced
    slow.touch()
    s = setup(slow, resources__planner_gpus=0.5, planner__weights_every_s=0.05)
    system = RaySystem(s)
    system.cluster.cpus = lambda: 1                                                 # one evaluator; that several share the jobs, tests/e2e/test_run.py shows
    pretrained, _ = advance_until(system, "pretrain")
    system.freeze_bc()
    facts = {"setup": s, "pretrained": pretrained, "bc": system.bc}
    facts["offline"] = {stream: ray.get(learner.weights.remote()) for stream, learner in system.learners.items()}
    advance_until(system, "online", lambda status, _: status.env_steps >= 20)
    facts["modules"] = ray.get(system.pool.members[0].actor.modules.remote())
    advance_until(system, "online", lambda *_: "rollout" in system.processes())
    facts["processes"] = system.processes()
    os.kill(facts["processes"]["rollout"][0], signal.SIGKILL)
    _, before = advance_until(system, "online", lambda _, incidents: any("rollout worker 0 joined" in line for line in incidents))
    slow.unlink()
    facts["online"], after = advance_until(system, "online")
    facts["incidents"] = before + after
    facts["planner"] = ray.get(system.planners[0].status.remote())
    facts["gauges"] = system.gauges()
    facts["final"] = {s: ray.get(learner.weights.remote()) for s, learner in system.learners.items()}
    facts["replay"] = system.replay_status()
    facts["timings"] = system.timings()
    facts["error"] = error_of_an_environment(system)
    facts["report"] = system.evaluate([j for m in ("bc", "policy", "mpc") for j in jobs_for(m, 3, 5)], lambda outcome: None)
    system.close()
    return facts


def test_offline_training_equals_the_serial_one_bit_for_bit(run):
    """Two learner processes fed through the replay actor end with the weights of the serial loop."""
    serial = SerialSystem(run["setup"])
    advance_until(serial, "pretrain")
    serial.freeze_bc()
    assert np.array_equal(serial.bc, run["bc"])
    for stream, weights in run["offline"].items():
        assert np.array_equal(serial.learner.agent.flat(stream), weights), stream
    assert run["pretrained"].updates == serial.learner.updates == 20


def wait_for_another(store, before: str) -> None:
    """Killing takes a moment, and so does beginning anew; until then the store answers as before, or not at all."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        with contextlib.suppress(ray.exceptions.RayActorError):
            if ray.get(store.pulse.remote(), timeout=120).incarnation != before:
                return
        time.sleep(0.05)
    raise AssertionError(f"the store did not begin anew within {PATIENCE_S:g} s")


def test_learners_do_not_wait_for_each_other_in_a_store_that_began_anew(cluster):
    """The policy learner's own part, which it put before, is what such a store lacks: waiting for it there would never end."""
    from modip_ray.actors.learner import LearnerActor
    from modip_ray.actors.replay import ReplayActor
    from modip_ray.actors.weights import WeightStore
    s = setup()
    store, replay = WeightStore.options(name="store-a").remote(s.spec.weights), ReplayActor.options(name="replay-a").remote(s.cfg, s.episodes, None)
    policy = LearnerActor.options(num_cpus=0).remote(s.cfg, s.spec, "policy", ["replay-a"], "store-a", None)
    ray.get(policy.settle.remote())
    before = ray.get(store.pulse.remote()).incarnation
    ray.kill(store, no_restart=False)
    wait_for_another(store, before)
    assert set(ray.get(store.status.remote())) == {"agent"}
    ray.get(policy.pull.remote(), timeout=120)
    waiting = store.newer.remote({})                                                              # who acts waits for all parts
    assert ray.wait([waiting], timeout=0.5)[0] == []
    model = LearnerActor.options(num_cpus=0).remote(s.cfg, s.spec, "model", ["replay-a"], "store-a", None)
    ray.get([policy.settle.remote(), model.settle.remote(), store.restore.remote({}, 7)])
    parts, env_steps = ray.get(waiting, timeout=120)
    assert set(parts) == {"agent", "policy", "model", "target_critic"} and env_steps == 7
    del replay


def test_a_killed_worker_comes_back_and_training_ends(run):
    text = " | ".join(run["incidents"])
    assert "rollout worker 0 died" in text and "rollout worker 0 joined" in text
    assert STEPS_ONLINE <= run["online"].env_steps < STEPS_ONLINE + 60
    rate = run["setup"].cfg.online.updates_per_step
    assert run["online"].updates == 20 + int(rate * run["online"].env_steps)
    assert run["online"].policy_updates == run["replay"]["allowed"]["policy"]


def test_rollout_workers_import_no_torch(run):
    assert "torch" not in run["modules"] and "numpy" in run["modules"]


def test_the_planner_was_scheduled_on_the_declared_gpu_batched_and_got_new_weights(run):
    planner = run["planner"]
    assert planner["device"] == "cpu" or torch.cuda.is_available()
    batches, rows, requests, waited = planner["totals"]
    assert 0 < batches < requests and rows >= STEPS_ONLINE and waited > 0
    assert planner["versions"]["model"] > 20, "weights from the online phase"


def test_every_role_reports_its_time(run):
    timings = run["timings"]
    assert {"driver", "planner", "learner", "replay", "rollout"} <= set(timings)
    assert timings["learner"][1] == 2 and "update/model" in timings["learner"][0]["seconds"] and "update/policy" in timings["learner"][0]["seconds"]
    assert "wait/planner" in timings["rollout"][0]["seconds"] and timings["rollout"][1] == run["gauges"]["rollout/workers"], "the killed one is no process"


def test_evaluators_return_all_jobs_and_diagnostics(run):
    report = run["report"]
    assert {(o.job.mode, o.job.seeds) for o in report.outcomes} == {(m, (5, 6, 7)) for m in ("bc", "policy", "mpc")}
    assert all(np.isfinite(o.returns).all() and len(o.returns) == 3 for o in report.outcomes)
    assert len(report.diagnostics["latent_r2"]) == len(report.diagnostics["reward_r2"]) > 0


def test_evaluation_is_the_same_on_ray_and_in_process(run):
    from modip_ray.learning.evaluation import run_job
    s = run["setup"]
    agent = agent_of(s.cfg, s.spec, torch.device("cpu"))
    for part, vector in run["final"].items():
        agent.load_flat(vector, part)
    for outcome in run["report"].outcomes:
        assert run_job(s.cfg, agent, PointEnv, outcome.job, run["report"].env_steps, run["bc"]).returns == outcome.returns


def test_more_gpus_than_there_are_is_an_error_that_names_the_field(cluster):
    from modip_ray.actors.system import RaySystem
    with pytest.raises(ConfigError, match="resources.planner_gpus=3"):
        RaySystem(setup(resources__planner_gpus=3.0))


def test_an_error_of_the_environment_reaches_the_user(run):
    assert "the arm is stuck" in str(run["error"])
