import numpy as np
import pytest

from modip_ray.tasks.collect import collect
from modip_ray.tasks.env_group import make_env
from modip_ray.tasks.envs import env_seed


def zeros(obs, slots, reset):
    return np.zeros((len(obs), 1, 1), np.float32)


def two_lengths(seed):
    return 2 if seed % 2 else 60


@pytest.mark.parametrize("num_envs", [1, 3, 32])
def test_episodes_are_kept_in_order_of_start(count_env, num_envs):
    episodes = collect(zeros, lambda: count_env(length=two_lengths), 500, 100, seed=4, num_envs=num_envs)
    expected, k = [], 0
    while sum(expected) < 500:                                                             # the same whatever the number of envs
        expected.append(two_lengths(env_seed(4, 0, k)))
        k += 1
    assert [e.length for e in episodes] == expected
    assert [e.observations[0, 0] for e in episodes] == [env_seed(4, 0, k) % 1000 for k in range(len(expected))]


def test_short_episodes_are_not_favoured(count_env):
    """Half of all episodes are short; the first to END would be nearly all short."""
    short = [np.mean([e.length == 2 for e in collect(zeros, lambda: count_env(length=two_lengths), 600, 100, seed=s, num_envs=16)]) for s in range(60)]
    assert np.mean(short) == pytest.approx(0.5, abs=0.06)


def test_enough_transitions_and_no_needless_episodes(count_env):
    made = []

    class Counted(count_env):
        def reset(self, **kwargs):
            made.append(1)
            return super().reset(**kwargs)
    seen = []
    episodes = collect(zeros, Counted, 1000, 100, seed=0, num_envs=8, progress=lambda done, total: seen.append((done, total)))
    assert len(episodes) == len(made) == 10 and all(e.length == 100 and not e.terminated for e in episodes)
    assert seen[-1] == (1000, 1000) and seen == sorted(seen)


def test_a_policy_object_samples_with_a_seeded_generator(count_env):
    class Policy:
        def act(self, obs, rng):
            return rng.uniform(-1, 1, (len(obs), 1))
    first, again, other = (collect(Policy(), count_env, 20, 10, seed=s, num_envs=2) for s in (1, 1, 2))
    assert (first[0].actions == again[0].actions).all() and (first[0].actions != other[0].actions).any()
    assert np.unique(np.concatenate([e.actions for e in first])).size == 20


def test_bad_amount_is_refused(count_env):
    with pytest.raises(ValueError, match="transitions is 0"):
        collect(zeros, count_env, 0, 10, seed=0)


def test_hopper_episodes_end_by_falling():
    episodes = collect(lambda o, s, r: np.zeros((len(o), 4, 3), np.float32), lambda: make_env("Hopper-v4"), 300, 1000, seed=0, num_envs=4)
    assert sum(e.length for e in episodes) >= 300 and all(e.validate().terminated for e in episodes)
