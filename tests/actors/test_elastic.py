"""One run on a small cluster of several nodes: workers come and go with nodes, two planners, two replay shards, roles where their resources are."""

import dataclasses
import re
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import ray

from modip_ray.config import ConfigError
from modip_ray.learning.build import build_spec
from modip_ray.learning.checkpoint import begin, commit
from modip_ray.learning.system import Setup
from modip_ray.tasks.collect import collect
from tests.advance import PATIENCE_S, advance_until
from tests.fakes import STEPS, Noisy, PointEnv, small
from tests.private_ray import QUIET, surroundings

pytestmark = pytest.mark.ray
TRAINER = {"trainer": 0.01}
PLACEMENT = {"rollout": {"rollout": 1}, **{role: TRAINER for role in ("planner", "learner", "replay", "store", "evaluator")}}


class SlowPoint(PointEnv):
    """So slow, while the file is there, that workers join and leave before the steps are over, on a busy machine too."""

    def __init__(self, slow):
        super().__init__()
        self.slow = slow

    def step(self, action):
        time.sleep(0.3 if self.slow.exists() else 0.005)
        return super().step(action)


@pytest.fixture(scope="module")
def nodes():
    from ray.cluster_utils import Cluster

    with surroundings():
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "resources": {"trainer": 1}, "include_dashboard": False})
        cluster.add_node(num_cpus=1, resources={"rollout": 1})
        ray.init(address=cluster.address, **QUIET)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def setup(slow=Path("/no/such/file"), **dotted) -> Setup:
    cfg = small(**{"pretrain__updates": 21, "pretrain__policy_updates": 21, "rollout__num_workers": {"min": 1, "max": 3}, "rollout__envs_per_worker": 2,
                   "rollout__groups": 2, "planner__replicas": 2, "replay__shards": 2, "replay__samples_per_insert_slack": 1000.0,
                   "resources__placement": PLACEMENT, **dotted})
    episodes = collect(Noisy(), PointEnv, 600, STEPS, seed=0, num_envs=4)
    return Setup(cfg, build_spec(cfg, episodes, -np.ones(2), np.ones(2)), episodes, partial(SlowPoint, slow))


def rows_planned(system) -> list[int]:
    return [status["totals"][1] for status in ray.get([planner.status.remote() for planner in system.planners])]


def error_of_another_disk(system, folder) -> ConfigError:
    """As if replay and learners looked at another disk than the driver when it asks them, before anything is trained, whether they see the run's folder."""
    from modip_ray.actors import system as module
    before, system.setup = system.setup, dataclasses.replace(system.setup, folder=folder)
    system.check_folder()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ConfigError) as error:
        patch.setattr(module, "PROBE", ".another_file")
        system.check_folder()
    system.setup = before
    return error.value


@pytest.fixture(scope="module")
def run(nodes, tmp_path_factory):
    from modip_ray.actors.system import RaySystem
    slow = tmp_path_factory.mktemp("gate") / "slow"
    slow.touch()
    s = setup(slow, online__env_steps=1500)
    system, facts = RaySystem(s), {}
    facts["unseen"] = error_of_another_disk(system, tmp_path_factory.mktemp("folder"))
    facts["pretrained"], _ = advance_until(system, "pretrain")
    system.freeze_bc()
    advance_until(system, "online", lambda *_: system.pool is not None and len(system.pool.members) == 1)
    with surroundings():
        more = nodes.add_node(num_cpus=2, resources={"rollout": 2})
    _, facts["joining"] = advance_until(system, "online", lambda *_: len(system.pool.members) == 3)
    slow.unlink()
    at = system.env_steps
    advance_until(system, "online", lambda *_: system.env_steps > at + 250 and min(rows_planned(system)) >= 50)
    slow.touch()
    facts["three"] = system.gauges()
    nodes.remove_node(more, allow_graceful=False)
    _, facts["leaving"] = advance_until(system, "online", lambda *_: len(system.pool.members) == 1)
    slow.unlink()
    facts["online"], _ = advance_until(system)
    facts["gauges"], facts["replay"] = system.gauges(), system.replay_status()
    facts["shards"] = [ray.get(replay.status.remote()) for replay in system.replays]
    facts["planned"] = rows_planned(system)
    folder = begin(tmp_path_factory.mktemp("run") / "checkpoints")
    facts["checkpoint"] = commit(folder, system.save(folder), 1)
    facts["weights"] = {stream: ray.get(learner.weights.remote()) for stream, learner in system.learners.items()}
    before = actors_alive(0.0)
    system.close()                                                                  # the Ray is not its own, so only its actors go
    facts["left"] = before, actors_alive()
    return facts


def actors_alive(patience_s=PATIENCE_S) -> list[str]:
    """Names of the actors that Ray still has, once there are none or patience ends: a kill takes a moment."""
    from ray._private import state
    deadline = time.monotonic() + patience_s
    while (names := [a["ActorClassName"] for a in state.actors().values() if a["State"] != "DEAD"]) and time.monotonic() < deadline:
        time.sleep(0.2)
    return names


def test_nothing_of_a_closed_run_stays_on_a_ray_that_goes_on(run):
    before, after = run["left"]
    assert {"LearnerActor", "PlannerActor", "ReplayActor", "RolloutWorker", "WeightStore", "EvaluatorActor"} <= set(before) and after == []


def test_workers_follow_the_nodes(run):
    assert sum("joined" in line for line in run["joining"]) == 2
    assert sum("died" in line or "did not answer" in line for line in run["leaving"]) == 2
    assert run["three"]["rollout/workers"] == 3 and run["three"]["rollout/nodes"] == 2
    assert run["gauges"]["rollout/workers"] == 1 and run["gauges"]["rollout/lost"] == 2 and run["gauges"]["rollout/waiting"] == 2


def test_what_was_acknowledged_is_stored_once(run):
    assert 1500 <= run["replay"]["env_steps"] < 1600
    assert 0 < run["gauges"]["rollout/acknowledged"] <= run["replay"]["env_steps"]
    assert run["replay"]["segments"] == sum(s["segments"] for s in run["shards"]) > 0


def test_both_shards_and_both_planners_had_their_part(run):
    assert all(s["env_steps"] >= 50 for s in run["shards"])
    assert sum(run["planned"]) >= 1500 and min(run["planned"]) >= 50


def test_updates_are_exactly_what_the_shards_allowed(run):
    """An odd number of offline updates over two shards, then the rate of what each shard stored."""
    assert run["pretrained"].updates == run["pretrained"].policy_updates == 21
    assert run["online"].updates == run["replay"]["allowed"]["model"] == 21 + sum(int(0.25 * s["env_steps"]) for s in run["shards"])


def test_a_sharded_run_resumes_where_it_was(run, nodes):
    """With one planner less, as a checkpoint has nothing of planners."""
    from modip_ray.actors.system import RaySystem
    from modip_ray.learning.checkpoint import newest
    s = setup(online__env_steps=1600, planner__replicas=1)
    system = RaySystem(dataclasses.replace(s, checkpoint=newest(run["checkpoint"].parent)))
    for stream, learner in system.learners.items():
        assert np.array_equal(ray.get(learner.weights.remote()), run["weights"][stream])
    assert system.env_steps == run["replay"]["env_steps"] and system.counts["model"] == run["online"].updates
    status, _ = advance_until(system)
    assert status.env_steps >= 1600 and status.updates == system.replay_status()["allowed"]["model"] > run["online"].updates
    system.close()


@pytest.mark.parametrize("dotted, words", [
    ({"resources__placement": {"planner": {"tpu": 1}}}, ["tpu: 2 asked for", "resources.placement.planner.tpu=1 x 2", "Ray has 0"]),
    ({"resources__planner_gpus": 1.0}, ["GPU: 2 asked for", "resources.planner_gpus=1 x 2"]),
    ({"rollout__num_workers": 9}, ["rollout: 9 asked for", "resources.placement.rollout.rollout=1 x 9"]),
    ({"resources__placement": {"planner": {"trainer": 0.01, "rollout": 0.1}}}, ["planner: no node has"]),
])
def test_what_the_cluster_lacks_is_named_with_its_setting(nodes, dotted, words):
    from modip_ray.actors.system import RaySystem
    with pytest.raises(ConfigError) as error:
        RaySystem(setup(**dotted))
    for word in words:
        assert word in str(error.value)


def test_a_run_folder_that_the_replay_cannot_see_is_refused(run):
    assert re.match("run_dir: .* is not seen by the replay", str(run["unseen"]))
