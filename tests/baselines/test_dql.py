"""distill.q_weight: the denoising loss with Q beside it."""

import math

import numpy as np
import pytest
import torch

from modip_ray.baselines import dql
from modip_ray.model.diffusion import DiffusionPolicy
from modip_ray.run import train
from tests.baselines.test_tdmpc2 import DA, Quadratic
from tests.fakes import PointEnv, small, write_data
from tests.learning.test_learner import draw_chunks, linear_system, make_learner

H, DO, STEPS = 2, 4, 3
DQL = {"distill.q_weight": 1.0, "critic.target": "policy_q", "critic.target_reduce": "min_two", "critic.n_step": 1, "planner.kind": "action_values",
       "planner.gaussian": 0, "planner.horizon": 1, "planner.proposals": 10, "planner.elites": 10, "planner.iterations": 0, "guard.value_penalty": 0.0,
       "guard.min_gain": -1e9}


class Known:
    """Q of test_tdmpc2.py on latents that are the observations."""

    q = Quadratic()

    @staticmethod
    def decode(out):
        return out

    @staticmethod
    def encode(obs):
        return obs


def arguments(rows=64, seed=0):
    rng = torch.Generator().manual_seed(seed)
    obs, chunk = (torch.rand(rows, *shape, generator=rng) * 1.6 - 0.8 for shape in ((DO,), (H, DA)))
    t, mask, weight = torch.randint(8, (rows,), generator=rng), torch.ones(rows, H), torch.ones(rows)
    return obs, chunk, weight, mask, t, torch.randn(rows, H, DA, generator=rng), mask.sum()


def make_policy():
    torch.manual_seed(0)
    return DiffusionPolicy(DO, DA, H, 8, 32, 1)


def test_it_is_the_denoising_loss_less_the_scaled_q_of_a_drawn_action():
    policy, args = make_policy(), arguments()
    obs, noise = args[0], args[5]
    action = policy.sample(obs, noise[torch.arange(-1, len(noise) - 1)][:, None], STEPS)[:, 0, 0]
    q = Known.q(torch.cat([obs, action], -1))
    expected = policy.loss(*args) - 0.7 / H * q.mean() / q.abs().mean()                  # the chunk's first action has an H-th of the denoising loss
    torch.testing.assert_close(dql.loss(policy, Known, Known, 0.7, STEPS, *args), expected)
    torch.testing.assert_close(dql.loss(policy, Known, Known, 0.0, STEPS, *args), policy.loss(*args))


def test_the_gradient_goes_through_the_chain():
    """Against differences of the loss itself, for the last layer's bias; Q has none, and its scale counts as a constant."""
    policy, args = make_policy().double(), [a.double() if a.is_floating_point() else a for a in arguments()]
    bias = policy.out[-1].bias
    dql.loss(policy, Known, Known, 1.0, STEPS, *args).backward()
    obs, noise = args[0], args[5]
    with torch.no_grad():
        def q():
            return Known.q(torch.cat([obs, policy.sample(obs, noise.roll(1, 0)[:, None], STEPS)[:, 0, 0]], -1))
        scale = q().abs().mean()
        found = []
        for i in range(len(bias)):
            ends = []
            for step in (1e-5, -1e-5):
                bias[i] += step
                ends.append(float(policy.loss(*args) - q().mean() / scale / H))
                bias[i] -= step
            found.append((ends[0] - ends[1]) / 2e-5)
    np.testing.assert_allclose(bias.grad.numpy(), found, rtol=2e-2, atol=1e-4)
    assert Known.q.level.grad is None and max(abs(g) for g in found) > 1e-3


def test_with_much_weight_actions_move_from_the_data_to_where_q_is_high():
    def trained(weight):
        policy = make_policy()
        opt = torch.optim.Adam(policy.parameters(), 3e-3)
        for step in range(200):
            obs, chunk, *rest = arguments(seed=step)
            opt.zero_grad()
            dql.loss(policy, Known, Known, weight, STEPS, obs, chunk * 0 + 0.9, *rest).backward()
            opt.step()
        obs, noise = arguments(256, 999)[0], torch.randn(256, 1, H, DA)
        return policy.sample(obs, noise, STEPS)[:, 0, 0], obs[:, :DA]
    (imitated, _), (drawn, best) = trained(0.0), trained(30.0)
    assert (imitated - 0.9).abs().mean() < 0.05 and (drawn - best).abs().mean() < 0.2 * (imitated - best).abs().mean()


def test_offline_updates_are_plain_behaviour_cloning_and_online_ones_move_the_policy_alone():
    settings = [f"{k}={v}" for k, v in DQL.items()]
    plain, own, rows = make_learner("critic.target=policy_q"), make_learner(*settings), draw_chunks(linear_system(1), np.random.default_rng(0))
    assert float(plain.update_policy(rows, distil=False)["loss/policy"]) == float(own.update_policy(rows, distil=False)["loss/policy"])
    before = {k: v.clone() for k, v in own.agent.state_dict().items()}
    assert float(plain.update_policy(rows, distil=True)["loss/policy"]) != float(own.update_policy(rows, distil=True)["loss/policy"])
    assert {k.split(".")[0] for k, v in own.agent.state_dict().items() if not torch.equal(v, before[k])} == {"policy"}
    assert all(p.grad is None for p in (*own.agent.world_model.parameters(), *own.agent.critic.parameters()))


@pytest.mark.parametrize("compile", [False, True])
def test_a_run(tmp_path, compile, traced):
    cfg = small(run_dir=str(tmp_path / "run"), serial=True, data__source=str(write_data(tmp_path / "data.hdf5")), online__env_steps=120,
                resources__compile=compile).replace(DQL)
    summary = train(cfg, PointEnv)
    assert all(math.isfinite(summary["scores"][mode]["mean"]) for mode in ("bc", "policy", "mpc"))
    assert summary["updates"] == 60 + int(cfg.online.updates_per_step * summary["env_steps"])
    assert bool(traced) is compile
