import pytest
import torch
from torch import nn

from modip_ray.model.diffusion import DiffusionPolicy, ddim_timesteps
from modip_ray.model.unet import TemporalUNet, halvings, norm

HORIZONS = [1, 3, 4, 8, 16]


def unet_policy(horizon=4, width=32, blocks=1, seed=0, **kwargs):
    torch.manual_seed(seed)
    return DiffusionPolicy(3, 2, horizon, 20, width, blocks, network="unet", **kwargs)


def batch(horizon, rows=6, seed=1):
    """obs, chunk, weight, mask, t, noise as DiffusionPolicy.loss takes them."""
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, 3, generator=g), torch.rand(rows, horizon, 2, generator=g) * 2 - 1, torch.ones(rows), torch.ones(rows, horizon),
            torch.randint(20, (rows,), generator=g), torch.randn(rows, horizon, 2, generator=g))


@pytest.mark.parametrize("horizon, times", [(1, 0), (2, 0), (3, 0), (4, 1), (7, 1), (8, 2), (16, 2), (64, 2)])
def test_at_least_two_steps_are_left(horizon, times):
    assert halvings(horizon) == times


@pytest.mark.parametrize("channels, groups", [(256, 8), (64, 8), (16, 4), (12, 2), (8, 2), (6, 1), (4, 1), (2, 1), (1, 1)])
def test_groups_hold_several_channels(channels, groups):
    assert norm(channels).num_groups == groups


@pytest.mark.parametrize("parametrization", ["sample", "eps"])
@pytest.mark.parametrize("horizon", [*HORIZONS, 2, 5, 6, 7, 11])
def test_any_horizon_samples_and_learns(horizon, parametrization):
    policy = unet_policy(horizon, parametrization=parametrization)
    samples = policy.sample(torch.randn(5, 3), torch.randn(5, 4, horizon, 2), 3)
    assert samples.shape == (5, 4, horizon, 2) and samples.isfinite().all() and samples.abs().max() <= 1
    policy.loss(*batch(horizon)).backward()
    without = [name for name, p in policy.named_parameters() if p.grad is None or not (p.grad.abs().max() > 1e-7)]
    assert not without


@pytest.mark.parametrize("horizon", [4, 16])
def test_every_step_of_a_chunk_is_seen_and_predicted(horizon):
    """The prediction depends on the order of a chunk's steps, and on all of them."""
    policy = unet_policy(horizon)
    noisy = torch.randn(1, horizon * 2, requires_grad=True)
    clean, _ = policy.denoise(policy.embed(torch.randn(1, 3)), noisy, torch.tensor([10]))
    assert (clean.abs() > 0).all()
    clean.square().sum().backward()
    assert (noisy.grad.abs() > 0).all()
    flipped = noisy.detach().view(1, horizon, 2).flip(1).flatten(1)
    assert not torch.allclose(policy.denoise(policy.embed(torch.zeros(1, 3)), flipped, torch.tensor([10]))[0].view(1, horizon, 2).flip(1).flatten(1),
                              policy.denoise(policy.embed(torch.zeros(1, 3)), noisy.detach(), torch.tensor([10]))[0], atol=1e-3)


def test_actions_are_channels_and_steps_are_places():
    """Number h * Da + a of a flat chunk is action a at step h, on the way in and out; H = 5 is padded with a zero, which is cut off again."""
    net, seen = TemporalUNet(2, 5, 32, 1), {}
    net.down[0][0].conv1.register_forward_hook(lambda m, args, out: seen.update(first=args[0]))
    net.out.register_forward_hook(lambda m, args, out: seen.update(last=out))
    chunk = torch.arange(30.0).view(3, 10)
    out = net(net.film_obs(torch.zeros(3, 32)), chunk, torch.zeros(1, 32))
    assert seen["first"].shape == seen["last"].shape == (3, 2, 6) and (seen["first"][..., 5] == 0).all()
    for h in range(5):
        for a in range(2):
            assert torch.equal(seen["first"][:, a, h], chunk[:, 2 * h + a]) and torch.equal(seen["last"][:, a, h], out[:, 2 * h + a])


def test_detail_passes_by_the_coarse_levels():
    net = TemporalUNet(2, 8, 32, 1)
    for grow in net.grow:                                                                   # nothing comes up from below
        nn.init.zeros_(grow.weight)
        nn.init.zeros_(grow.bias)
    film = net.film_obs(torch.zeros(1, 32))
    a, b = (net(film, torch.randn(1, 16), torch.zeros(1, 32)) for _ in range(2))
    assert (a - b).abs().max() > 1e-2


@pytest.mark.parametrize("horizon", HORIZONS)
def test_rows_and_samples_do_not_mix(horizon):
    policy = unet_policy(horizon)
    obs, noise = torch.randn(4, 3), torch.randn(4, 3, horizon, 2)
    whole = policy.sample(obs, noise, 3)
    rows, samples = torch.tensor([2, 0, 3, 1]), torch.tensor([1, 2, 0])
    torch.testing.assert_close(policy.sample(obs[rows], noise[rows], 3), whole[rows], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(policy.sample(obs, noise[:, samples], 3), whole[:, samples], rtol=1e-4, atol=1e-5)
    for row in range(4):
        for n in range(3):
            torch.testing.assert_close(policy.sample(obs[row:row + 1], noise[row:row + 1, n:n + 1], 3)[0, 0], whole[row, n], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(policy.sample(obs[rows], noise, 3), whole, atol=1e-3)         # and the observation does matter


def test_an_observation_is_embedded_once():
    policy, calls = unet_policy(), []
    for module in (policy.obs_in, policy.unet.film_obs):
        module.register_forward_hook(lambda m, args, out: calls.append(len(args[0])))
    policy.sample(torch.randn(5, 3), torch.randn(5, 24, 4, 2), 4)
    assert calls == [5, 5]


def test_ddim_follows_the_recursion_with_the_unet():
    """Sampling again by hand from denoise's own predictions, each sample with its observation embedded by itself."""
    policy, steps = unet_policy(), 4
    obs, noise = torch.randn(2, 3), torch.randn(2, 3, 4, 2)
    with torch.no_grad():
        x = noise.reshape(6, 8)
        features = policy.embed(obs.repeat_interleave(3, 0))
        times = ddim_timesteps(20, steps)
        for t, following in zip(times, [*times[1:], None], strict=True):
            clean = policy.denoise(features, x, torch.full((6,), t))[0].clamp(-1, 1)
            ab = policy.alpha_bar[t]
            x = clean if following is None else (policy.alpha_bar[following].sqrt() * clean
                                                 + ((1 - policy.alpha_bar[following]) / (1 - ab)).sqrt() * (x - ab.sqrt() * clean))
    torch.testing.assert_close(policy.sample(obs, noise, steps), x.view(2, 3, 4, 2), rtol=1e-4, atol=1e-5)


def test_overfits_a_two_modal_data_set(horizon=5):                                         # 5: padded to 6 and halved
    """obs > 0: chunks +ramp or -ramp, each half the time; obs < 0: constant -0.5. Samples must hit a mode, find both, and never their mean."""
    torch.manual_seed(0)
    policy = DiffusionPolicy(1, 1, horizon, 20, 32, 1, network="unet")
    ramp = torch.linspace(0.2, 0.8, horizon).view(1, horizon, 1)
    sign = torch.tensor([1.0, -1.0]).repeat(16).view(32, 1, 1)
    obs = torch.cat([torch.ones(32, 1), -torch.ones(32, 1)])
    chunks = torch.cat([sign * ramp, torch.full((32, horizon, 1), -0.5)])
    optimizer = torch.optim.Adam(policy.parameters(), 5e-3)
    for _ in range(150):
        loss = policy.loss(obs, chunks, torch.ones(64), torch.ones(64, horizon), torch.randint(20, (64,)), torch.randn(chunks.shape))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    samples = policy.sample(torch.tensor([[1.0], [-1.0]]), torch.randn(2, 200, horizon, 1), 10)        # (2, 200, H, 1)
    far = torch.minimum((samples[0] - ramp).abs().amax((1, 2)), (samples[0] + ramp).abs().amax((1, 2)))
    assert (far < 0.15).float().mean() > 0.9                                               # the modes' mean, 0, is 0.8 away from both
    assert 0.25 < (samples[0, :, 0, 0] > 0).float().mean() < 0.75
    assert (samples[1] + 0.5).abs().mean() < 0.05


def test_levels_and_widths():
    net = TemporalUNet(2, 16, 64, 2)
    assert [part[0].channels for part in net.down] == [16, 32] and net.middle[0].channels == 64 and [part[0].channels for part in net.up] == [32, 16]
    assert len(net.middle) == 2 and net.padding == 0 and TemporalUNet(2, 11, 64, 1).padding == 1 and TemporalUNet(2, 3, 64, 1).padding == 0
    assert not TemporalUNet(2, 1, 64, 1).down
    assert all(isinstance(m, nn.GroupNorm | nn.SiLU | nn.Conv1d | nn.ConvTranspose1d | nn.Linear | nn.Identity)
               for m in net.modules() if not list(m.children()) and not isinstance(m, nn.ModuleList))


@pytest.mark.parametrize("kwargs, words", [
    ({"width": 30, "horizon": 8}, "policy.width must be a multiple of 4 for the unet with policy.horizon=8, got 30"),
    ({"blocks": 0}, "policy.blocks must be at least 1 for the unet, got 0"),
])
def test_impossible_shapes_are_refused(kwargs, words):
    with pytest.raises(ValueError, match=words):
        unet_policy(**kwargs)
