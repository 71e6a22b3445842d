import numpy as np
import pytest
import torch

from modip_ray.config import load
from modip_ray.model.agent import Agent, Normalizer

TINY = ["policy.width=16", "policy.blocks=1", "world_model.latent=16", "world_model.width=16", "critic.width=8", "critic.members=2"]


def agent(seed, obs_dim=3, action_dim=2, head="regression"):
    torch.manual_seed(seed)
    made = Agent(load(overrides=[*TINY, f"critic.head={head}"]), obs_dim, action_dim)
    made.normalizer.fit(np.random.default_rng(seed).normal(seed, 2, (50, obs_dim)).astype(np.float32), -np.ones(action_dim), np.ones(action_dim), 0.01)
    return made


def test_normalizer_by_hand():
    n = Normalizer(2, 2)
    n.fit(np.array([[0, 5], [4, 5]], np.float32), np.array([-1.0, 0.0]), np.array([1.0, 4.0]), floor=0.5)
    assert (n.obs_mean.tolist(), n.obs_std.tolist()) == ([2.0, 5.0], [2.0, 0.5])        # the second column never moves: the floor
    torch.testing.assert_close(n.obs(torch.tensor([[4.0, 5.5], [1e6, -1e6]])), torch.tensor([[1.0, 1.0], [10.0, -10.0]]))
    torch.testing.assert_close(n.action(torch.tensor([[0.5, 3.0], [-1.0, 9.0]])), torch.tensor([[0.5, 0.5], [-1.0, 1.0]]))
    torch.testing.assert_close(n.raw_action(torch.tensor([[0.5, 0.5], [-1.0, 1.0]])), torch.tensor([[0.5, 3.0], [-1.0, 4.0]]))


def test_normalizer_round_trip():
    n, rng = Normalizer(3, 2), np.random.default_rng(0)
    low, high = np.array([-0.4, 1.0], np.float32), np.array([0.4, 7.0], np.float32)
    obs = rng.normal([0, 10, -5], [1, 0.1, 30], (5000, 3)).astype(np.float32)
    n.fit(obs, low, high, 0.01)
    scaled = n.obs(torch.from_numpy(obs))
    torch.testing.assert_close(scaled.mean(0), torch.zeros(3), atol=1e-3, rtol=0)
    torch.testing.assert_close(scaled.std(0), torch.ones(3), atol=1e-3, rtol=0)
    actions = torch.from_numpy(rng.uniform(low, high, (100, 2)).astype(np.float32))
    torch.testing.assert_close(n.raw_action(n.action(actions)), actions)


def test_normalizer_is_exact_on_many_rows_far_from_zero():
    """A float32 running sum over 10^6 rows misses this mean by a quarter of the std."""
    obs = (1.3 + 0.01 * np.random.default_rng(0).standard_normal((1_000_000, 2))).astype(np.float32)
    n = Normalizer(2, 1)
    n.fit(obs, -np.ones(1), np.ones(1), 1e-3)
    torch.testing.assert_close(n.obs_mean, torch.full((2,), 1.3), atol=1e-4, rtol=0)
    torch.testing.assert_close(n.obs_std, torch.full((2,), 0.01), atol=1e-4, rtol=0)


@pytest.mark.parametrize("head", ["regression", "two_hot"])
def test_flat_round_trip(head):
    one, two = agent(1, head=head), agent(2, head=head)
    one.critic.shift.fill_(7.0)
    vector = one.flat()
    assert vector.dtype == np.float32 and vector.ndim == 1 and not np.array_equal(vector, two.flat())
    two.load_flat(vector)
    for name, value in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[name], value, rtol=0, atol=0, msg=name)
    np.testing.assert_array_equal(two.flat(), vector)


def test_load_flat_takes_a_copy_and_a_read_only_vector():
    one, two = agent(1), agent(2)
    vector = one.flat()
    expected = vector.copy()
    vector.setflags(write=False)                                    # as it comes out of shared memory
    two.load_flat(vector)
    with torch.no_grad():
        two.critic.shift.add_(1)
    np.testing.assert_array_equal(vector, expected)


@pytest.mark.parametrize("change", [lambda v: v[:-1], lambda v: np.append(v, 0), lambda v: v[None]])
def test_load_flat_refuses_a_wrong_length(change):
    a = agent(1)
    before = a.flat()
    with pytest.raises(ValueError, match=rf"does not fit this agent, which holds {len(before)} numbers"):
        a.load_flat(change(before))
    np.testing.assert_array_equal(a.flat(), before)


def test_frozen_copy_is_apart_and_without_gradients():
    a = agent(1)
    frozen = a.frozen_copy()
    assert not any(p.requires_grad for p in frozen.parameters()) and all(p.requires_grad for p in a.parameters())
    with torch.no_grad():
        a.critic.net.biases[0].add_(1)
    assert frozen.critic.net.biases[0].abs().max() == 0


def test_parts_cover_all_that_learns_and_load_apart():
    one, two = agent(1), agent(2)
    names = [set(one.part(p)) for p in ("policy", "model")]
    assert not names[0] & names[1] and names[0] | names[1] == {k for k in one.part() if not k.startswith("normalizer.")}
    model_before = two.flat("model")
    two.load_flat(one.flat("policy"), "policy")
    np.testing.assert_array_equal(two.flat("policy"), one.flat("policy"))
    np.testing.assert_array_equal(two.flat("model"), model_before)
    with pytest.raises(ValueError, match="does not fit policy"):
        two.load_flat(one.flat("model"), "policy")
    with pytest.raises(ValueError, match="agent part 'critic'"):
        one.flat("critic")


def test_observations_by_range_with_a_floor():
    n = Normalizer(3, 1)
    n.fit(np.array([[0.0, 5.0, 1.0], [4.0, 5.001, 1.0], [1.0, 5.0, 1.0]], np.float32), np.array([-1.0]), np.array([1.0]), 0.05, "range")
    seen = n.obs(torch.tensor([[0.0, 5.0, 1.0], [4.0, 5.001, 1.05]]))
    torch.testing.assert_close(seen, torch.tensor([[-1.0, -0.01, 0.0], [1.0, 0.01, 1.0]]), atol=1e-4, rtol=0)
