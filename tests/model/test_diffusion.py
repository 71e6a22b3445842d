import math

import pytest
import torch
from torch import nn

from modip_ray.model.diffusion import TIME_DIM, DiffusionPolicy, cosine_alpha_bar, ddim_timesteps
from modip_ray.model.networks import ResidualMLP, timestep_features


class GaussianPolicy(DiffusionPolicy):
    """A policy whose denoiser is the optimal one for data that are N(mean, std^2) in every dimension, whatever the observation."""

    def __init__(self, mean: float, std: float, steps: int, horizon: int = 2, action_dim: int = 3):
        super().__init__(1, action_dim, horizon, steps, width=4, blocks=1)
        self.mean, self.std = mean, std

    def denoise(self, obs_features, noisy, t):
        ab = self.alpha_bar[t].unsqueeze(-1)                        # noisy = sqrt(ab) x + sqrt(1 - ab) eps
        clean = self.mean + ab.sqrt() * self.std ** 2 / (ab * self.std ** 2 + 1 - ab) * (noisy - ab.sqrt() * self.mean)     # E[x | noisy]
        return clean, (noisy - ab.sqrt() * clean) / (1 - ab).sqrt()


@pytest.mark.parametrize("mean, std", [(0.2, 0.1), (-0.5, 0.05), (0.0, 0.2)])
def test_ddim_samples_a_known_gaussian(mean, std):
    noise = torch.randn(4, 2000, 2, 3, generator=torch.Generator().manual_seed(0))
    samples = GaussianPolicy(mean, std, steps=1000).sample(torch.zeros(4, 1), noise, 1000)
    assert samples.shape == noise.shape
    assert samples.mean().item() == pytest.approx(mean, abs=0.003)
    assert samples.std().item() == pytest.approx(std, rel=0.03)
    torch.testing.assert_close(samples.std((0, 1)), torch.full((2, 3), std), rtol=0.06, atol=0)


@pytest.mark.parametrize("steps", [1, 3, 5, 20])
def test_ddim_with_few_steps_follows_the_recursion_by_hand(steps):
    # the optimal denoiser of a Gaussian is affine, so every DDIM step is x -> a x + b, worked out here in double precision
    mean, std, k = 0.3, 0.1, 20
    ab = cosine_alpha_bar(k).double().tolist()
    noise = torch.randn(1, 50, 2, 3, generator=torch.Generator().manual_seed(1))
    x = noise.double()
    times = ddim_timesteps(k, steps)
    for t, nxt in zip(times, [*times[1:], None], strict=True):
        clean = mean + math.sqrt(ab[t]) * std ** 2 / (ab[t] * std ** 2 + 1 - ab[t]) * (x - math.sqrt(ab[t]) * mean)
        assert clean.abs().max() < 1                                # the clamp to [-1, 1] does not bite here
        x = clean if nxt is None else math.sqrt(ab[nxt]) * clean + math.sqrt((1 - ab[nxt]) / (1 - ab[t])) * (x - math.sqrt(ab[t]) * clean)
    samples = GaussianPolicy(mean, std, k).sample(torch.zeros(1, 1), noise, steps)
    torch.testing.assert_close(samples, x.float(), rtol=1e-3, atol=1e-4)


def test_samples_are_clamped_to_the_action_box():
    noise = torch.randn(1, 500, 2, 3, generator=torch.Generator().manual_seed(0))
    outside = GaussianPolicy(2.0, 0.1, 20).sample(torch.zeros(1, 1), noise, 5)
    torch.testing.assert_close(outside, torch.ones_like(outside))
    edge = GaussianPolicy(0.9, 0.2, 20).sample(torch.zeros(1, 1), noise, 20)
    assert edge.abs().max() <= 1 and 0.1 < (edge == 1).float().mean() < 0.5             # P(N(0.9, 0.2) > 1) = 0.31


def test_each_row_gets_its_own_observation_and_noise():
    torch.manual_seed(0)
    policy = DiffusionPolicy(3, 2, 4, 20, width=16, blocks=1)
    obs, noise = torch.randn(3, 3), torch.randn(3, 5, 4, 2)
    whole = policy.sample(obs, noise, 4)
    for row in range(3):
        for n in range(5):
            torch.testing.assert_close(policy.sample(obs[row:row + 1], noise[row:row + 1, n:n + 1], 4)[0, 0], whole[row, n], rtol=1e-4, atol=1e-5)


def test_cosine_schedule_by_hand():
    f = [math.cos((t / 4 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(5)]        # betas clipped at 0.999: only the last one here
    expected = [f[1] / f[0], f[2] / f[0], f[3] / f[0], 0.001 * f[3] / f[0]]
    torch.testing.assert_close(cosine_alpha_bar(4), torch.tensor(expected), rtol=1e-4, atol=0)


@pytest.mark.parametrize("steps", [1, 20, 100])
def test_the_schedule_decreases_from_signal_to_noise(steps):
    ab = cosine_alpha_bar(steps)
    assert ab.shape == (steps,) and (ab > 0).all() and (ab < 1).all() and (ab[1:] < ab[:-1]).all() and ab[-1] < 0.01


@pytest.mark.parametrize("train, steps, expected", [
    (20, 1, [19]), (20, 2, [19, 0]), (20, 3, [19, 10, 0]), (5, 5, [4, 3, 2, 1, 0]), (1, 1, [0]), (9, 5, [8, 6, 4, 2, 0]),
])
def test_ddim_timesteps_by_hand(train, steps, expected):
    assert ddim_timesteps(train, steps) == expected


def test_ddim_timesteps_descend_without_repeats():
    for train in range(1, 25):
        for steps in range(2, train + 1):
            times = ddim_timesteps(train, steps)
            assert len(times) == steps and times[0] == train - 1 and times[-1] == 0 and all(a > b for a, b in zip(times, times[1:], strict=False))


@pytest.mark.parametrize("steps", [0, 21])
def test_impossible_step_counts_are_refused(steps):
    with pytest.raises(ValueError, match=f"1..20 .*got {steps}"):
        ddim_timesteps(20, steps)


@pytest.mark.parametrize("parametrization", ["sample", "eps"])
def test_the_two_predictions_agree_with_the_noisy_chunk(parametrization):
    torch.manual_seed(0)
    policy = DiffusionPolicy(3, 2, 2, 20, width=8, blocks=1, parametrization=parametrization)
    noisy, t = torch.randn(6, 4), torch.arange(0, 18, 3)
    clean, eps = policy.denoise(torch.zeros(6, 8), noisy, t)
    ab = policy.alpha_bar[t].unsqueeze(-1)
    torch.testing.assert_close(ab.sqrt() * clean + (1 - ab).sqrt() * eps, noisy, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("parametrization, squares", [("sample", [1.0, 4.0, 0.0]), ("eps", [4.0, 1.0, 9.0])])
def test_loss_by_hand(parametrization, squares):
    """A network that answers 0: the error is the clean chunk itself, or the noise itself."""
    policy = DiffusionPolicy(1, 1, 2, 20, width=4, blocks=1, parametrization=parametrization)
    nn.init.zeros_(policy.out[-1].weight)
    nn.init.zeros_(policy.out[-1].bias)
    chunk = torch.tensor([1.0, 2.0, 0.0])[:, None, None].expand(3, 2, 1)
    noise = torch.tensor([2.0, 1.0, 3.0])[:, None, None].expand(3, 2, 1)
    t, obs = torch.tensor([0, 5, 19]), torch.zeros(3, 1)
    weight, mask = torch.tensor([1.0, 0.5, 2.0]), torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
    expected = (1.0 * 2 * squares[0] + 0.5 * squares[1]) / (2 + 0.5)                    # the third row is masked out
    assert policy.loss(obs, chunk, weight, mask, t, noise).item() == pytest.approx(expected, rel=1e-5)
    nothing = policy.loss(obs, chunk, torch.zeros(3), mask, t, noise)
    assert nothing.item() == 0.0


def test_unknown_parametrization_is_refused():
    with pytest.raises(ValueError, match="policy.parametrization .*'velocity'"):
        DiffusionPolicy(1, 1, 1, parametrization="velocity")


def test_unknown_network_is_refused():
    with pytest.raises(ValueError, match="policy.network must be 'mlp' or 'unet', got 'transformer'"):
        DiffusionPolicy(1, 1, 1, network="transformer")


def test_the_mlp_has_the_names_the_order_and_the_numbers_of_earlier_checkpoints():
    """Built by hand, in the order in which seeds give weights; weight vectors travel in this order too."""
    torch.manual_seed(5)
    parts = {"obs_in": nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, 8)), "chunk_in": nn.Linear(8, 8),
             "time_in": nn.Sequential(nn.Linear(TIME_DIM, 8), nn.SiLU(), nn.Linear(8, 8)), "trunk": ResidualMLP(8, 2),
             "out": nn.Sequential(nn.LayerNorm(8), nn.SiLU(), nn.Linear(8, 8))}
    expected = {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}
    torch.manual_seed(5)
    policy = DiffusionPolicy(3, 2, 4, 20, width=8, blocks=2)
    assert list(policy.state_dict()) == ["alpha_bar", *expected]
    assert all(torch.equal(policy.state_dict()[key], value) for key, value in expected.items())
    obs, noisy, t = torch.randn(6, 3), torch.randn(6, 8), torch.arange(6)
    by_hand = parts["out"](parts["trunk"](parts["obs_in"](obs) + parts["chunk_in"](noisy) + parts["time_in"](timestep_features(t, TIME_DIM))))
    torch.testing.assert_close(policy.denoise(policy.embed(obs), noisy, t)[0], by_hand)
    many, rows = torch.arange(40) % 20, torch.arange(40) % 6         # more rows than steps: embedded by step
    torch.testing.assert_close(policy.denoise(policy.embed(obs)[rows], noisy[rows], many)[0],
                               torch.cat([policy.denoise(policy.embed(obs)[rows[i:i + 1]], noisy[rows[i:i + 1]], many[i:i + 1])[0] for i in range(40)]))
