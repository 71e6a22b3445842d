import pickle
import re

import gymnasium as gym
import numpy as np
import pytest

from modip_ray.tasks.env_group import EnvError, EnvGroup, make_env
from modip_ray.tasks.envs import env_seed


def chunk(n, c, value=0.5):
    return np.full((n, c, 1), value, np.float32)


def test_chunk_is_executed_action_by_action(count_env):
    group = EnvGroup(count_env, 2, 100, seed=3)
    obs = group.reset()
    assert obs.dtype == np.float32 and obs.tolist() == [[env_seed(3, i, 0) % 1000, 0, 0] for i in range(2)]
    actions = np.array([[[0.1], [0.2], [0.3]], [[0.4], [5.0], [-5.0]]], np.float32)
    r = group.step(actions)
    second = r.transitions[1]
    assert second.rewards.tolist() == [1, 2, 3]
    assert second.obs[:, 1].tolist() == [0, 1, 2] and second.next_obs[:, 1].tolist() == [1, 2, 3]
    assert second.actions[:, 0].tolist() == pytest.approx([0.4, 1.0, -1.0])                 # clipped to the Box, as executed
    assert second.next_obs[:, 2].tolist() == pytest.approx([0.4, 1.0, -1.0])
    assert r.obs[:, 1].tolist() == [3, 3] and not r.reset.any()
    assert group.env_steps == 6


def test_termination_drops_the_rest_of_the_chunk_and_keeps_the_true_last_observation(count_env):
    group = EnvGroup(lambda: count_env(length=lambda seed: 6), 1, 100, seed=0)
    group.reset()
    group.step(chunk(1, 4))
    r = group.step(chunk(1, 4))
    t = r.transitions[0]
    assert len(t.rewards) == len(t.obs) == len(t.actions) == len(t.next_obs) == 2
    assert t.next_obs[-1, 1] == 6 and t.terminated and not t.truncated                      # not the 0 of the next reset
    assert r.obs[0].tolist() == [env_seed(0, 0, 1) % 1000, 0, 0]
    assert r.reset.tolist() == r.finished.tolist() == r.terminated.tolist() == [True] and not r.truncated[0]
    assert group.env_steps == 6 and group._envs[0].executed == 6                            # actions, not chunks
    assert group.finished_returns() == [(0, 21.0, 6, env_seed(0, 0, 0))]
    assert group.finished_returns() == []


def test_time_limit_is_a_truncation(count_env):
    group = EnvGroup(count_env, 1, 5, seed=0)
    group.reset()
    assert not group.step(chunk(1, 4)).reset[0]
    r = group.step(chunk(1, 4))
    assert r.truncated[0] and not r.terminated[0] and r.transitions[0].truncated
    assert r.transitions[0].next_obs[:, 1].tolist() == [5] and r.obs[0, 1] == 0


def test_termination_at_the_time_limit_is_a_termination(count_env):
    group = EnvGroup(lambda: count_env(length=lambda seed: 5), 1, 5, seed=0)
    group.reset()
    r = group.step(chunk(1, 8))
    assert r.terminated[0] and not r.truncated[0]


def test_envs_end_independently(count_env):
    lengths = iter([lambda seed: 2, lambda seed: 10**9])
    group = EnvGroup(lambda: count_env(length=next(lengths)), 2, 100, seed=0)
    group.reset()
    r = group.step(chunk(2, 3))
    assert [len(t.rewards) for t in r.transitions] == [2, 3]
    assert r.reset.tolist() == [True, False] and r.obs[:, 1].tolist() == [0, 3]
    r = group.step(chunk(2, 1))
    assert r.transitions[0].obs[0, 1] == 0 and r.transitions[1].obs[0, 1] == 3
    assert group.env_steps == 7


def test_seeds_depend_on_group_env_and_episode(count_env):
    def seeds(seed):
        group = EnvGroup(count_env, 3, 2, seed)
        group.reset()
        group.step(chunk(3, 2))
        group.step(chunk(3, 2))
        return [f.seed for f in group.finished_returns()]
    assert seeds(1) == seeds((1,)) and len(set(seeds(1) + seeds(2) + seeds((1, 2)))) == 18


def test_results_do_not_change_under_later_steps(count_env):
    group = EnvGroup(count_env, 1, 100, seed=0)
    group.reset()
    first = group.step(chunk(1, 2))
    kept = first.obs.copy(), first.transitions[0].next_obs.copy()
    first.obs[:] = -1                                                                      # nor does the caller's writing reach the group
    second = group.step(chunk(1, 2))
    assert (first.transitions[0].next_obs == kept[1]).all() and (second.transitions[0].obs[0] == kept[0][0]).all()


@pytest.mark.parametrize(("fault", "words"), [
    (lambda env, o, r: (o * np.nan if env.t == 2 else o, r), "env 1: observation .* not finite at step 2"),
    (lambda env, o, r: (o, np.inf if env.t == 3 else r), "env 1: reward inf is not finite at step 3"),
    (lambda env, o, r: (o[:2], r), "env 1: step failed with ValueError: observation of 2 numbers"),
    (lambda env, o, r: 1 / 0, "env 1: step failed with ZeroDivisionError"),
])
def test_a_faulty_env_is_named(count_env, fault, words):
    faults = iter([None, fault])
    group = EnvGroup(lambda: count_env(fault=next(faults)), 2, 100, seed=0)
    group.reset()
    with pytest.raises(EnvError, match=words):
        group.step(chunk(2, 4))


FAULTS = {
    "nan": (lambda env, o, r: (o * np.nan if env.t == 3 else o, r), "env 1: observation .* is not finite at step 3", False),
    "reward": (lambda env, o, r: (o, "much" if env.t == 3 else r), "env 1: step failed with ValueError", False),
    "shape": (lambda env, o, r: (o[:2] if env.t == 3 else o, r), r"env 1: .* observation_space has shape \(3,\)", False),
    "crash": (lambda env, o, r: (o, 1 / 0 if env.t == 3 else r), "env 1: step failed with ZeroDivisionError", True),
}


@pytest.mark.parametrize(("fault", "words", "crashed"), FAULTS.values(), ids=FAULTS)
def test_a_failed_env_is_made_anew_and_the_good_part_of_its_episode_is_kept(count_env, fault, words, crashed):
    faults, made = iter([None, fault, None]), []
    group = EnvGroup(lambda: made.append(count_env(fault=next(faults))) or made[-1], 2, 100, seed=0, max_failures=1)
    group.reset()
    result = group.step(chunk(2, 4))
    assert len(made) == 3 and group.env_steps == 6
    (error,), good = group.faults, result.transitions[1]
    assert re.match(words, str(error)) and error.crashed == crashed and error.steps == 2
    assert good.next_obs[:, 1].tolist() == [1, 2] and good.rewards.tolist() == [1, 2] and good.truncated and not good.terminated
    assert result.reset.tolist() == [False, True] and result.obs[1, 1] == 0 and result.obs[0, 1] == 4 and not group.finished_returns()
    assert group.step(chunk(2, 4)).transitions[1].next_obs[:, 1].tolist() == [1, 2, 3, 4] and len(group.faults) == 1


def test_a_reset_that_fails_makes_the_env_anew(count_env):
    class NoSecondReset(count_env):
        resets = 0

        def reset(self, **kwargs):
            self.resets += 1
            if self.resets == 2:
                raise OSError("no display")
            return super().reset(**kwargs)
    group = EnvGroup(lambda: NoSecondReset(length=lambda seed: 2), 1, 100, seed=0, max_failures=1)
    group.reset()
    assert group.step(chunk(1, 4)).obs[0, 1] == 0 and [str(e) for e in group.faults] == ["env 0: reset failed with OSError: no display"]
    with pytest.raises(EnvError, match="no display"):
        group.step(chunk(1, 4))
    with pytest.raises(OSError, match="no display"):
        EnvGroup(lambda: setattr(env := NoSecondReset(), "resets", 1) or env, 1, 100, seed=0, max_failures=1).reset()


def test_a_broken_env_ends_it_and_a_rare_failure_does_not(count_env):
    broken = EnvGroup(lambda: count_env(fault=lambda env, o, r: 1 / 0), 1, 100, seed=0, max_failures=3)
    broken.reset()
    for _ in range(3):
        broken.step(chunk(1, 1))
    with pytest.raises(EnvError, match="ZeroDivisionError"):
        broken.step(chunk(1, 1))
    rare = EnvGroup(lambda: count_env(fault=lambda env, o, r: (o, r if env.t < 500 else 1 / 0)), 1, 10**9, seed=0, max_failures=3)
    rare.reset()
    for _ in range(1000):
        rare.step(chunk(1, 10))
    assert len(rare.faults) > 15 and rare.env_steps > 9500


def test_errors_keep_what_they_know_across_processes():
    error = pickle.loads(pickle.dumps(EnvError("env 3: fell over", 2, crashed=True)))
    assert (str(error), error.steps, error.crashed) == ("env 3: fell over", 2, True)


@pytest.mark.parametrize(("actions", "words"), [
    (np.zeros((2, 1), np.float32), r"must have shape \(2, chunk >= 1, 1\), got \(2, 1\)"), (np.zeros((3, 1, 1), np.float32), r"got \(3, 1, 1\)"),
    (np.zeros((2, 0, 1), np.float32), r"got \(2, 0, 1\)"), (np.array([[[0.0]], [[np.nan]]]), "action 0 of the chunk for env 1 is not finite"),
])
def test_bad_actions_are_refused(count_env, actions, words):
    group = EnvGroup(count_env, 2, 100, seed=0)
    group.reset()
    with pytest.raises(ValueError, match=words):
        group.step(actions)


def test_bad_factories_are_refused(count_env):
    env = count_env()
    with pytest.raises(ValueError, match="same environment twice"):
        EnvGroup(lambda: env, 2, 10, 0)
    with pytest.raises(ValueError, match="action_space must be a Box"):
        EnvGroup(lambda: gym.make("CartPole-v1"), 1, 10, 0)
    with pytest.raises(ValueError, match="max_episode_steps is 0"):
        EnvGroup(count_env, 1, 0, 0)
    with pytest.raises(RuntimeError, match="reset"):
        EnvGroup(count_env, 1, 10, 0).step(chunk(1, 1))


def test_make_env_is_silent_and_has_no_time_limit(recwarn):
    env = make_env("HalfCheetah-v4")
    assert not [w for w in recwarn if "out of date" in str(w.message)]
    assert "TimeLimit" not in str(env) and "Checker" not in str(env)
    env.reset(seed=0)
    assert not any(env.step(env.action_space.sample())[3] for _ in range(1001))


def test_group_equals_stepping_by_hand():
    group = EnvGroup(lambda: make_env("Hopper-v4"), 2, 1000, seed=5)
    group.reset()
    plan = np.random.default_rng(0).uniform(-1, 1, (60, 2, 2, 3)).astype(np.float32)
    got: list = [[], []]
    for actions in plan:
        for i, t in enumerate(group.step(actions).transitions):
            got[i].append(t)
    assert any(t.terminated for t in got[0])
    for i in range(2):
        env, episode = make_env("Hopper-v4", max_episode_steps=1000), 0
        obs = env.reset(seed=env_seed(5, i, 0))[0]
        for t in got[i]:
            for k in range(len(t.rewards)):
                np.testing.assert_array_equal(t.obs[k], obs.astype(np.float32))
                obs, reward, terminated, _, _ = env.step(t.actions[k])
                np.testing.assert_array_equal(t.next_obs[k], obs.astype(np.float32))
                assert t.rewards[k] == np.float32(reward) and terminated == (t.terminated and k == len(t.rewards) - 1)
            if t.terminated:
                episode += 1
                obs = env.reset(seed=env_seed(5, i, episode))[0]
