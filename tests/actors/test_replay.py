"""The replay actor is killed with -9 while it works: it comes back by itself with everything that it has answered for, once."""

import os
import signal
import time

import numpy as np
import pytest
import ray

from modip_ray.learning.checkpoint import begin, commit, write_state
from tests.learning.test_replay_server import EPISODES, config, segment
from tests.private_ray import private_ray

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def cluster():
    with private_ray(num_cpus=1):
        yield


def until_answered(call, timeout_s=240.0):
    """What callers do: ask again while the actor is away."""
    from ray.exceptions import RayActorError
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return ray.get(call(), timeout=timeout_s)
        except RayActorError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_kill_9_costs_nothing_that_was_answered_for(cluster, tmp_path):
    from ray.exceptions import RayTaskError

    from modip_ray.actors.replay import ReplayActor
    cfg = config(pretrain__updates=5, pretrain__policy_updates=5, online__min_online=1, replay__capacity=500, replay__samples_per_insert_slack=1e6)
    replay = ReplayActor.remote(cfg, EPISODES, None, 0, tmp_path)
    incarnations, acknowledged, rng = set(), 0, np.random.default_rng(0)
    for round in range(3):
        status = until_answered(replay.status.remote)
        incarnations.add(status["incarnation"])
        assert status["segments"] == acknowledged and status["env_steps"] == status["transitions"] == 3 * acknowledged and status["damaged"] == 0
        kill_after = acknowledged + int(rng.integers(1, 12))
        pid = int((tmp_path / "journal" / "replay" / ".lock").read_text())
        while acknowledged < kill_after:
            until_answered(lambda n=acknowledged: replay.add.remote([segment(n)]))
            acknowledged += 1
        sent = [replay.add.remote([segment(acknowledged + i)]) for i in range(8)]     # on their way when it is killed: answered or not
        os.kill(pid, signal.SIGKILL)
        del sent
        for i in range(8):                                                          # sent again: stored once, answered as stored
            until_answered(lambda n=acknowledged + i: replay.add.remote([segment(n)]))
        acknowledged += 8
        if round == 0:                                                              # later rounds find a checkpoint and what came after it
            folder = begin(tmp_path / "checkpoints")
            for stream in ("model", "policy"):
                write_state(folder, f"learner_{stream}", {"updates": np.array(7)})
            assert until_answered(lambda path=str(folder): replay.save.remote(path)) == 3 * acknowledged
            commit(folder, {"env_steps": 3 * acknowledged, "updates": 7}, 2)
            until_answered(lambda: replay.retire.remote("frozen"))
    assert len(incarnations) == 3
    with pytest.raises(RayTaskError, match="frozen was given up"):
        ray.get(replay.add.remote([segment(99, sender="0/frozen")]))
    batch = until_answered(lambda: replay.sample.remote("model", 9))                # a learner that is further than the checkpoint's
    assert batch["obs"].shape[0] == cfg.world_model.batch_size and until_answered(lambda: replay.sample.remote("model", 10**6)) is None
    ray.kill(replay)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "journal").write_text("a file where the folder should be")
    with pytest.raises(ray.exceptions.RayActorError, match="cannot be opened as the replay's journal"):
        ray.get(ReplayActor.remote(cfg, EPISODES, None, 0, tmp_path / "other").status.remote())
