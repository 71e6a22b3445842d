import numpy as np
import pytest

from modip_ray.tasks.env_group import EnvError, make_env
from modip_ray.tasks.rollout import rollout_episodes


def recorder(chunk=1, value=0.25):
    calls = []

    def act(obs, slots, reset):
        assert obs.shape == (len(slots), 3) and obs.dtype == np.float32 and reset.dtype == bool
        calls.append((slots.tolist(), reset.tolist(), obs[:, 1].tolist()))
        return np.full((len(slots), chunk, 1), value, np.float32)
    return act, calls


def test_one_episode_a_seed_in_order_and_only_live_envs_are_asked(count_env):
    act, calls = recorder()
    episodes = rollout_episodes(act, lambda: count_env(length=lambda seed: seed), [3, 1, 2], 100)
    assert [e.length for e in episodes] == [3, 1, 2] and all(e.validate().terminated for e in episodes)
    assert [c[0] for c in calls] == [[0, 1, 2], [0, 2], [0]]
    assert [c[1] for c in calls] == [[True] * 3, [False] * 2, [False]]
    assert episodes[0].observations.tolist() == [[3, 0, 0], [3, 1, 0.25], [3, 2, 0.25], [3, 3, 0.25]]
    assert episodes[0].ret == 6 and episodes[0].actions.tolist() == [[0.25]] * 3


def test_chunks_count_actions_and_stop_at_the_end(count_env):
    act, calls = recorder(chunk=4, value=9.0)
    first, second = rollout_episodes(act, lambda: count_env(length=lambda seed: seed), [6, 50], 10)
    assert (first.length, first.terminated) == (6, True) and first.observations[-1, 1] == 6
    assert (second.length, second.terminated) == (10, False) and second.observations[-1, 1] == 10 and len(second.observations) == 11
    assert second.actions.max() == 1.0                                                     # clipped: as executed
    assert [c[2] for c in calls] == [[0, 0], [4, 4], [8]]


@pytest.mark.parametrize("num_envs", [1, 2, 5, 40])
def test_fewer_envs_than_seeds_give_the_same_episodes(count_env, num_envs):
    seeds = [5, 1, 4, 4, 2, 9, 1]
    act, calls = recorder(chunk=2)
    episodes = rollout_episodes(act, lambda: count_env(length=lambda seed: seed), seeds, 100, num_envs=num_envs)
    assert [e.length for e in episodes] == seeds and [e.observations[0, 0] for e in episodes] == seeds
    assert max(len(c[0]) for c in calls) == min(num_envs, len(seeds))
    assert sum(sum(c[1]) for c in calls) == len(seeds)                                      # each start is marked once
    assert rollout_episodes(act, count_env, [], 10) == []


def test_faults_name_env_and_episode(count_env):
    def nan_at_7(env, obs, reward):
        return obs, np.nan if env.t == 7 and env.seed == 2 else reward
    with pytest.raises(EnvError, match="env 1, episode 1: reward nan is not finite at step 7"):
        rollout_episodes(recorder(3)[0], lambda: count_env(fault=nan_at_7), [1, 2], 20)
    with pytest.raises(ValueError, match=r"must have shape \(1, chunk >= 1, 1\)"):
        rollout_episodes(lambda o, s, r: np.zeros((1, 1)), count_env, [1], 20)


def test_an_episode_whose_environment_failed_is_begun_anew_from_its_seed_in_a_new_one(count_env):
    """Every second environment made is broken: it fails at step 7. The other slot's episode goes on; what acts is told that one begins again."""
    made, faults = [], []

    class Second(count_env):
        def __init__(self):
            super().__init__(length=lambda seed: 12)
            made.append(self)
            self.broken = len(made) == 2

        def step(self, action):
            if self.broken and self.t == 6:
                raise OSError("gone")
            return super().step(action)
    act, calls = recorder(3)
    first, second = rollout_episodes(act, Second, [1, 2], 20, attempts=2, faults=faults)
    assert first.length == second.length == 12 and made[2].seed == 2 and len(made) == 3
    assert len(faults) == 1 and "env 1, episode 1" in str(faults[0]) and faults[0].crashed
    assert [sum(c[1]) for c in calls if any(c[1])] == [2, 1]
    made.clear()
    with pytest.raises(EnvError, match="gone"):
        rollout_episodes(recorder(3)[0], Second, [1, 2], 20, attempts=1)


def test_envs_are_closed_even_after_an_error(count_env):
    closed = []

    class Closing(count_env):
        def close(self):
            closed.append(1)
    with pytest.raises(ZeroDivisionError):
        rollout_episodes(lambda o, s, r: 1 / 0, Closing, [1, 2], 20)
    assert len(closed) == 2


def test_real_environment_reaches_its_time_limit():
    episodes = rollout_episodes(lambda o, s, r: np.zeros((len(o), 4, 6), np.float32), lambda: make_env("HalfCheetah-v4"), [0, 1], 50)
    assert [e.length for e in episodes] == [50, 50] and not any(e.terminated for e in episodes)
    assert not (episodes[0].observations[0] == episodes[1].observations[0]).all()
