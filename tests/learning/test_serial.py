"""A serial run is a function of its seed: a checkpoint at any moment, in the middle of episodes and segments, is the whole state."""

import numpy as np
import pytest

from modip_ray.learning.build import build_spec
from modip_ray.learning.checkpoint import Checkpoint, begin, commit, newest
from modip_ray.learning.env_source import env_factory
from modip_ray.learning.serial import SerialSystem
from modip_ray.learning.system import Setup, Status
from modip_ray.learning.updater import learner_state
from modip_ray.tasks.collect import collect
from tests.baselines.test_tdmpc2 import TDMPC2
from tests.fakes import PointEnv, small

ENVS = {"point": {}, "cheetah": {"task.env": "HalfCheetah-v4", "task.max_episode_steps": 40}, "point_tdmpc2": TDMPC2}


class Uniform:
    """Any box of actions in -1..1."""

    def __init__(self, action_dim: int):
        self.action_dim = action_dim

    def act(self, obs, rng):
        return rng.uniform(-1, 1, (len(obs), self.action_dim)).astype(np.float32)


def build(env: str, checkpoint: Checkpoint | None = None, factory=None, folder=None) -> SerialSystem:
    cfg = small(serial=True).replace({"online.env_steps": 250, "pretrain.updates": 20, "pretrain.policy_updates": 20, "rollout.segment_length": 16,
                                      "planner.n_action_steps": 2, **ENVS[env]})
    dim = 6 if env == "cheetah" else 2
    episodes = collect(Uniform(dim), env_factory(cfg.task), 200, cfg.task.max_episode_steps, seed=0)
    return SerialSystem(Setup(cfg, build_spec(cfg, episodes, -np.ones(dim), np.ones(dim)), episodes, factory or env_factory(cfg.task), checkpoint=checkpoint,
                              folder=folder))


def advance(system: SerialSystem) -> Status:
    """The next slice: of the offline phase until that is done, then of the online phase."""
    offline = system.learner.updates < 20 or system.learner.policy_updates < 20
    return system.advance("pretrain" if offline else "online", 1.0, until=10_000)


def finish(system: SerialSystem) -> list[Status]:
    found = []
    while not found or not found[-1].done or found[-1].env_steps < 250:
        found.append(advance(system))
    system.close()
    return found


def saved(system: SerialSystem, root) -> Checkpoint:
    folder = begin(root)
    commit(folder, system.save(folder), 1)
    system.close()
    return newest(root)


def weights(system: SerialSystem) -> dict:
    return {k: v for part in learner_state(system.learner).values() for k, v in part.items()}


@pytest.mark.parametrize("env", ENVS)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, env):
    """Losses of every slice, returns, weights, optimisers and stored data; saved where nothing is collected yet and where episodes and segments are open."""
    straight = build(env)
    plain = finish(straight)
    system, found, opened = build(env), [], 0
    for stop in (1, len(plain) // 2, len(plain) - 2):
        while len(found) < stop:
            found.append(advance(system))
        opened += sum(s.length for s in system.collector.open) if system.collector is not None else 0
        system = build(env, saved(system, tmp_path / str(stop)))
    found += finish(system)
    assert found == plain and opened > 0 and any("loss/value" in s.metrics for s in plain[-3:]) and any(s.returns for s in plain)
    a, b = weights(straight), weights(system)
    assert a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)
    x, y = (s.replay.replay.online.rows(0, s.replay.env_steps) for s in (straight, system))
    assert all(np.array_equal(x[k], y[k], equal_nan=x[k].dtype.kind == "f") for k in x)


def test_an_environment_that_is_no_function_of_its_seed_begins_new_episodes_and_says_so(tmp_path):
    class Drifting(PointEnv):
        made = 0

        def reset(self, *, seed=None, options=None):
            Drifting.made += 1
            obs, info = super().reset(seed=seed)
            self.state[:2] += 0.001 * Drifting.made
            return self.state.copy(), info
    system = build("point", factory=Drifting)
    while not system.taken:
        advance(system)
    again = build("point", saved(system, tmp_path), Drifting)
    status = advance(again)
    assert [line for line in status.incidents if "new episodes" in line and "does not come out where it was" in line]
    assert finish(again)[-1].env_steps >= 250


@pytest.mark.parametrize("ray", [False, True])
def test_what_a_replay_acknowledged_under_ray_stays_where_the_run_goes_on_serially(tmp_path, ray):
    system = build("point", folder=tmp_path)
    while not system.replay.env_steps:
        advance(system)
    folder = begin(tmp_path / "checkpoints")
    counts = system.save(folder)
    if ray:
        (folder / "collection.safetensors").unlink()                                # as RaySystem.save leaves it
    commit(folder, counts, 1)
    while system.replay.env_steps == counts["env_steps"]:
        advance(system)
    later = system.replay.env_steps
    system.close()
    again = build("point", newest(tmp_path / "checkpoints"), folder=tmp_path)
    assert again.replay.env_steps == (later if ray else counts["env_steps"])
    assert finish(again)[-1].env_steps >= 250
