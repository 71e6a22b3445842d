import pytest
import torch

from modip_ray.model.world_model import WorldModel


def test_rollout_is_repeated_steps():
    torch.manual_seed(0)
    model, obs, actions = WorldModel(3, 2, latent=16, width=8), torch.randn(5, 3), torch.rand(5, 4, 2) * 2 - 1
    z = model.encode(obs)
    latents, rewards, terminations = model.rollout(z, actions)
    assert (latents.shape, rewards.shape, terminations.shape) == ((5, 5, 16), (5, 4), (5, 4))
    torch.testing.assert_close(latents[:, 0], z)
    for k in range(4):
        z, r, c = model.step(z, actions[:, k])
        torch.testing.assert_close(latents[:, k + 1], z)
        torch.testing.assert_close((rewards[:, k], terminations[:, k]), (r, c))


def test_latents_are_simplices_and_actions_matter():
    torch.manual_seed(0)
    model = WorldModel(3, 2, latent=16, width=8, simnorm_group=4)
    z, _, _ = model.step(model.encode(torch.randn(6, 3)), torch.zeros(6, 2))
    torch.testing.assert_close(z.view(6, 4, 4).sum(1), torch.ones(6, 4))
    moved, _, _ = model.step(model.encode(torch.zeros(1, 3)), torch.ones(1, 2))
    still, _, _ = model.step(model.encode(torch.zeros(1, 3)), torch.zeros(1, 2))
    assert not torch.allclose(moved, still)


def test_latent_must_fit_the_groups():
    with pytest.raises(ValueError, match="multiple of world_model.simnorm_group=8, got 20"):
        WorldModel(3, 2, latent=20, simnorm_group=8)
