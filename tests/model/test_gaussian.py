"""policy.kind: gaussian, in the diffusion policy's place."""

import math

import torch

from modip_ray.export import export_run, load_safetensors
from modip_ray.model.gaussian import GaussianPolicy
from modip_ray.run import train
from tests.fakes import PointEnv, small, write_data


def test_the_loss_is_the_likelihood_that_torch_computes():
    torch.manual_seed(0)
    policy, obs, chunk = GaussianPolicy(3, 2, 4, 20, width=16, blocks=1), torch.randn(5, 3), torch.rand(5, 4, 2) * 2 - 1
    mean, log_std = policy(obs)
    mask = torch.ones(5, 4)
    mask[0, 2:] = 0
    weight = torch.tensor([1.0, 2, 0, 1, 1])
    nll = -torch.distributions.Normal(mean, log_std.exp()).log_prob(chunk) - 0.5 * math.log(2 * math.pi)
    rows = weight[:, None] * mask
    torch.testing.assert_close(policy.loss(obs, chunk, weight, mask, None, None), (nll.mean(-1) * rows).sum() / rows.sum())


def test_it_learns_mean_and_spread_and_acts_by_its_mean():
    torch.manual_seed(0)
    policy, noise = GaussianPolicy(1, 1, 2, 20, width=32, blocks=1), torch.randn
    opt = torch.optim.Adam(policy.parameters(), 3e-3)
    for _ in range(400):
        obs = torch.rand(256, 1) * 2 - 1
        chunk = (0.5 * obs[:, None] + 0.2 * noise(256, 2, 1)).clamp(-1, 1)
        opt.zero_grad()
        policy.loss(obs, chunk, torch.ones(256), torch.ones(256, 2), None, None).backward()
        opt.step()
    obs = torch.tensor([[-0.6], [0.0], [0.8]])
    assert (policy.act(obs, noise(3, 2, 1), 5) - 0.5 * obs[:, None]).abs().max() < 0.06
    drawn = policy.sample(obs, noise(3, 4000, 2, 1), 5)
    assert drawn.shape == (3, 4000, 2, 1) and (drawn.std(1) - 0.2).abs().max() < 0.04 and drawn.abs().max() <= 1


def test_a_run_trains_plans_and_exports_with_it(tmp_path):
    run = tmp_path / "run"
    train(small(run_dir=str(run), serial=True, data__source=str(write_data(tmp_path / "data.hdf5")), policy__kind="gaussian", planner__tail="policy_q",
                online__env_steps=60), PointEnv)
    policy, _ = load_safetensors(export_run(run, "safetensors").path)
    assert isinstance(policy.policy, GaussianPolicy)
