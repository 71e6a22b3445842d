import math

import pytest
import torch
from torch import nn

from modip_ray.model.critic import ValueEnsemble, symexp, symlog, td_target, two_hot

BINS = torch.linspace(-2, 2, 5)


@pytest.mark.parametrize("x, row", [
    (0.25, [0, 0, 0.75, 0.25, 0]),
    (-1.5, [0.5, 0.5, 0, 0, 0]),
    (1.0, [0, 0, 0, 1, 0]),
    (2.0, [0, 0, 0, 0, 1]),                                         # the edges ...
    (-2.0, [1, 0, 0, 0, 0]),
    (7.0, [0, 0, 0, 0, 1]),                                         # ... and outside: clipped
    (-7.0, [1, 0, 0, 0, 0]),
])
def test_two_hot_by_hand(x, row):
    torch.testing.assert_close(two_hot(torch.tensor(x), BINS), torch.tensor(row, dtype=torch.float32))


@pytest.mark.parametrize("bins", [2, 51, 101])
def test_two_hot_has_the_right_expectation(bins):
    grid = torch.linspace(-10, 10, bins)
    x = torch.linspace(-10, 10, 333).view(3, 111)
    hot = two_hot(x, grid)
    assert hot.shape == (3, 111, bins) and (hot >= -1e-6).all()
    torch.testing.assert_close(hot.sum(-1), torch.ones_like(x))
    torch.testing.assert_close((hot * grid).sum(-1), x, atol=1e-4, rtol=0)
    assert ((hot > 1e-5).sum(-1) <= 2).all()


def test_symlog_by_hand_and_its_inverse():
    torch.testing.assert_close(symlog(torch.tensor([0.0, math.e - 1, 1 - math.e, 99.0])), torch.tensor([0.0, 1.0, -1.0, math.log(100)]))
    x = torch.tensor([-1e4, -300.0, -1.0, -1e-3, 0.0, 1e-3, 0.5, 12.0, 1e4], dtype=torch.float64)
    torch.testing.assert_close(symexp(symlog(x)), x)
    torch.testing.assert_close(symlog(symexp(x[2:7])), x[2:7])


def test_td_target_bootstraps_unless_the_discount_is_zero():
    y = td_target(torch.tensor([1.0, 1.0, 2.5]), torch.tensor([0.9, 0.0, 0.81]), torch.tensor([10.0, 1e6, -1.0]))
    torch.testing.assert_close(y, torch.tensor([10.0, 1.0, 1.69]))


def silent(critic, biases):
    """Members that answer a constant: the last layer's bias."""
    for p in critic.parameters():
        nn.init.zeros_(p)
    with torch.no_grad():
        critic.net.biases[-1][:] = torch.tensor(biases).view(critic.members, 1, -1)
    return critic


def test_values_are_in_return_units():
    critic = silent(ValueEnsemble(4, 8, members=2), [0.5, -1.0])
    critic.shift.fill_(100.0)
    critic.scale.fill_(20.0)
    torch.testing.assert_close(critic(torch.ones(3, 4)), torch.tensor([[110.0] * 3, [80.0] * 3]))


@pytest.mark.parametrize("expectile, above, below", [(0.5, 1.0, 1.0), (0.9, 1.8, 0.2), (0.7, 1.4, 0.6)])
def test_expectile_loss_by_hand(expectile, above, below):
    critic = silent(ValueEnsemble(4, 8, members=1, expectile=expectile), [0.0])
    critic.shift.fill_(10.0)
    critic.scale.fill_(2.0)                                         # targets 16 and 6 are +3 and -2 in head units
    loss = critic.loss(torch.ones(2, 4), torch.tensor([16.0, 6.0]))
    torch.testing.assert_close(loss, torch.tensor([[9.0 * above, 4.0 * below]]))


def test_the_expectile_minimiser_is_above_the_mean():
    # of targets 0 and 1 the 0.9-expectile e solves 0.9 (1 - e) = 0.1 e: e = 0.9
    critic = silent(ValueEnsemble(4, 8, members=1, expectile=0.9), [0.0])
    bias = critic.net.biases[-1]
    opt = torch.optim.SGD([bias], lr=0.2)
    for _ in range(60):
        opt.zero_grad()
        critic.loss(torch.ones(2, 4), torch.tensor([0.0, 1.0])).mean().backward()
        opt.step()
    assert bias.item() == pytest.approx(0.9, abs=1e-3)


def test_two_hot_head_by_hand():
    critic = silent(ValueEnsemble(4, 8, members=1, head="two_hot", bins=5, bound=2.0), [0.0] * 5)
    torch.testing.assert_close(critic(torch.ones(1, 4)), torch.zeros(1, 1))             # uniform over symmetric bins
    torch.testing.assert_close(critic.loss(torch.ones(1, 4), torch.tensor([3.0])), torch.full((1, 1), math.log(5)))
    with torch.no_grad():
        critic.net.biases[-1][:] = torch.tensor([-50.0, -50, -50, 0, 0])                # half on 1, half on 2: symexp(1.5)
    torch.testing.assert_close(critic(torch.ones(1, 4)), torch.tensor([[math.exp(1.5) - 1]]))


def test_two_hot_values_are_float32_where_products_are_bf16():
    torch.manual_seed(0)
    critic, z = ValueEnsemble(4, 8, members=3, head="two_hot", bins=101, bound=10.0), torch.randn(50, 4)
    with torch.autocast("cpu", torch.bfloat16):
        out = critic.net(z)
        values = critic.decode(out)
        error = critic.error(out, torch.linspace(-5, 5, 50))
    assert out.dtype is torch.bfloat16 and values.dtype is error.dtype is torch.float32
    torch.testing.assert_close(values, critic.decode(out.float()), atol=1e-6, rtol=0)


def test_two_hot_loss_is_least_at_the_target():
    critic = silent(ValueEnsemble(4, 8, members=1, head="two_hot", bins=21, bound=5.0), [0.0] * 21)
    target = torch.tensor([30.0])
    with torch.no_grad():
        critic.net.biases[-1][:] = two_hot(symlog(target), critic.bins).clamp(min=1e-9).log()
    torch.testing.assert_close(critic(torch.ones(1, 4)), target[None], rtol=1e-3, atol=0)
    at_target = critic.loss(torch.ones(1, 4), target).item()
    assert all(critic.loss(torch.ones(1, 4), target + d).item() > at_target for d in (-5, 5))


def test_unknown_head_is_refused():
    with pytest.raises(ValueError, match="critic.head .*'onehot'"):
        ValueEnsemble(4, head="onehot")
