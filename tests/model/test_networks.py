import math

import pytest
import torch
from torch import nn

from modip_ray.model.networks import EnsembleMLP, ResidualMLP, SimNormLinear, ema_update, timestep_features


def simnorm(x, group):
    """SimNormLinear of the identity product: only the normalisation is left."""
    layer = SimNormLinear(x.shape[-1], x.shape[-1], group)
    nn.init.eye_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer(x)


def test_simnorm_by_hand():
    # 4 features, groups of 2: feature i is in group i % 2, so (x0, x2) and (x1, x3) are softmaxed together
    x = torch.tensor([[0.0, 0.0, math.log(3.0), 0.0]])
    torch.testing.assert_close(simnorm(x, 2), torch.tensor([[0.25, 0.5, 0.75, 0.5]]))


@pytest.mark.parametrize("shape", [(16,), (3, 16), (2, 5, 16)])
def test_simnorm_groups_are_simplices(shape):
    x = 5 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    y = simnorm(x, 8)
    assert y.shape == x.shape and (y >= 0).all()
    for group in range(2):                                          # 16 features in groups of 8: 2 groups, a stride of 2 apart
        torch.testing.assert_close(y[..., group::2], x[..., group::2].softmax(-1))
        torch.testing.assert_close(y[..., group::2].sum(-1), torch.ones(shape[:-1]))


def test_simnorm_is_a_linear_layer_before_it_is_normalised():
    torch.manual_seed(0)
    layer, x = SimNormLinear(5, 12, 4), torch.randn(7, 5)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias).view(7, 4, 3).softmax(1).view(7, 12))
    assert list(layer.state_dict()) == ["weight", "bias"]


def test_ensemble_equals_its_members_one_by_one():
    torch.manual_seed(0)
    net, x = EnsembleMLP(3, [4, 6, 5, 2]), torch.randn(7, 2, 4)
    for params in (net.norm_scales, net.norm_shifts, net.biases):   # untrained ones and zeros would hide a mix-up
        for p in params:
            nn.init.normal_(p)
    for e in range(3):
        h = x
        for i in range(2):
            h = h @ net.weights[i][e] + net.biases[i][e]
            h = nn.functional.silu(nn.functional.layer_norm(h, h.shape[-1:]) * net.norm_scales[i][e] + net.norm_shifts[i][e])
        torch.testing.assert_close(net(x)[e], h @ net.weights[2][e] + net.biases[2][e])
    assert net(x).shape == (3, 7, 2, 2) and net(x[0, 0]).shape == (3, 2)


def test_ensemble_members_start_different():
    out = EnsembleMLP(4, [3, 8, 1])(torch.ones(1, 3)).flatten()
    assert len(set(out.tolist())) == 4


def test_residual_mlp_with_silent_blocks_is_the_identity():
    net = ResidualMLP(4, 2)
    for block in net.blocks:
        nn.init.zeros_(block[-1].weight)
        nn.init.zeros_(block[-1].bias)
    x = torch.randn(5, 4)
    torch.testing.assert_close(net(x), x)


def test_timestep_features_by_hand():
    out = timestep_features(torch.tensor([0, 2]), 4)                # frequencies 1 and 1/10000
    expected = [[0, 0, 1, 1], [math.sin(2), math.sin(2e-4), math.cos(2), math.cos(2e-4)]]
    torch.testing.assert_close(out, torch.tensor(expected))


def test_ema_update_by_hand():
    target, source = nn.Linear(2, 1), nn.Linear(2, 1)
    with torch.no_grad():
        target.weight.copy_(torch.tensor([[1.0, 2.0]]))
        target.bias.fill_(4.0)
        source.weight.copy_(torch.tensor([[3.0, -2.0]]))
        source.bias.fill_(0.0)
    ema_update(target, source, 0.25)                                # 0.75 * target + 0.25 * source
    torch.testing.assert_close(target.weight, torch.tensor([[1.5, 1.0]]), check_dtype=False)
    torch.testing.assert_close(target.bias, torch.tensor([3.0]), check_dtype=False)
    assert source.weight.tolist() == [[3.0, -2.0]]
