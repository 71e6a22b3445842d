"""policy.kind: tdmpc2: the objective, its scale, targets, the planner's tail, and a run of it."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from modip_ray.baselines.tdmpc2 import LatentPolicy
from modip_ray.config import load
from modip_ray.export import ExportError, export_run
from modip_ray.learning.checkpoint import newest
from modip_ray.learning.system import saved_bc
from modip_ray.learning.updater import load_parts
from modip_ray.model.critic import td_target
from modip_ray.planning.planner import Planner
from modip_ray.policy import load as load_run
from modip_ray.run import train
from tests.fakes import PointEnv, small, write_data
from tests.learning.test_learner import draw, linear_system, make_learner

TDMPC2 = {"policy.kind": "tdmpc2", "policy.ema": 0.0, "planner.tail": "policy_q", "planner.first_round": "wide", "critic.target": "policy_q",
          "critic.target_reduce": "min_two", "critic.head": "two_hot", "critic.n_step": 1, "critic.pretrain_n_step": 1, "critic.members": 3,
          "guard.trust": 2.0, "guard.trust_final": 2.0, "guard.std_max": 2.0, "guard.std_max_final": 2.0, "guard.value_penalty": 0.0, "guard.min_gain": -1e9}
DZ, DA, H = 4, 2, 3


class Quadratic(nn.Module):
    """Two heads of Q(z, a) = level - |a - z[:Da]|^2, the best action being the beginning of the latent."""

    def __init__(self):
        super().__init__()
        self.level = nn.Parameter(torch.tensor([[1.0], [3.0]]))

    def forward(self, x):
        z, a = x.split([DZ, DA], -1)
        return self.level.view(2, *[1] * (x.ndim - 1)) - (a - z[..., :DA]).square().sum(-1)


def known():
    """A model whose latent is the observation and never moves, and a critic that is known."""
    model = SimpleNamespace(encode=lambda obs: obs, rollout=lambda z, a: (z[:, None].expand(-1, a.shape[1] + 1, -1),))
    return model, SimpleNamespace(q=Quadratic(), decode=lambda out: out)


def make_policy(**settings):
    torch.manual_seed(0)
    return LatentPolicy(load().replace({"policy.horizon": H, "policy.width": 32, "world_model.latent": 8} | settings), DA)


def rows(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    obs, chunk = torch.rand(n, 8, generator=generator) * 1.6 - 0.8, torch.rand(n, H, DA, generator=generator)
    return obs, chunk, torch.randn(n, H, DA, generator=generator)


def small_policy(**settings):
    policy = make_policy(**settings)
    policy.net[0] = nn.Linear(DZ, 32)
    return policy


def objective(policy, critic, obs, chunk, noise, mask=None):
    mask = torch.ones(len(obs), H) if mask is None else mask
    return policy.loss(known()[0], critic, obs, chunk, torch.ones(len(obs)), mask, None, noise, mask.sum())


def trained(entropy):
    policy, (_, critic) = small_policy(**{"policy.entropy": entropy}), known()
    opt = torch.optim.Adam(policy.parameters(), 1e-2)
    for step in range(120):
        obs, chunk, noise = rows(64, step)
        opt.zero_grad()
        objective(policy, critic, obs[:, :DZ], chunk, noise).backward()
        opt.step()
    assert critic.q.level.grad is None                              # Q is asked, not taught
    return policy


def test_it_climbs_a_known_q_and_the_bonus_widens_it():
    z = rows(256, 1000)[0][:, :DZ]
    best, narrow, wide = z[:, :DA], trained(0.0), trained(0.2)
    before = (small_policy().mean(z) - best).square().sum(-1).mean()
    after = (narrow.mean(z) - best).square().sum(-1).mean()
    assert before > 0.3 and after < 0.02
    assert wide(z)[1].mean() > narrow(z)[1].mean() + 1


def test_the_gradient_is_that_of_the_published_objective():
    """Mean over steps of rho^k * batch mean of -(entropy + Q / scale), the entropy as the published code has it: with both log-probabilities."""
    policy, (_, critic) = small_policy(**{"policy.entropy": 0.3, "world_model.rho": 0.5}), known()
    obs, chunk, noise = rows(32)
    obs = obs[:, :DZ]
    policy.scale.fill_(4.0)
    policy.tau = 0.0
    objective(policy, critic, obs, chunk, noise).backward()
    found = [p.grad.clone() for p in policy.parameters()]
    policy.zero_grad()
    z = obs[:, None].expand(-1, H, -1)
    mean, log_std = policy(z)
    drawn = mean + log_std.exp() * noise
    log_prob = torch.distributions.Normal(mean, log_std.exp()).log_prob(drawn).sum(-1)
    scaled, squashed = DA * log_prob, log_prob - (1 - drawn.tanh().square() + 1e-6).log().sum(-1)
    entropy = -squashed * scaled / (squashed + 1e-8)
    q = 2 - (drawn.tanh() - z[..., :DA]).square().sum(-1)
    (-(0.3 * entropy + q / 4).mean(0) * 0.5 ** torch.arange(H)).mean().backward()
    for mine, p in zip(found, policy.parameters(), strict=True):
        torch.testing.assert_close(mine, p.grad, rtol=1e-3, atol=1e-6)
    assert max(g.abs().max() for g in found) > 1e-3


def test_steps_behind_an_episodes_end_do_not_count():
    policy, (_, critic) = small_policy(), known()
    obs, chunk, noise = rows(16)
    mask, spoiled = torch.ones(16, H), noise.clone()
    mask[:8, 1:], spoiled[:8, 1:] = 0, 9.0
    with torch.no_grad():
        one, two, whole = (objective(copy.deepcopy(policy), critic, obs[:, :DZ], chunk, n, m) for n, m in ((noise, mask), (spoiled, mask), (spoiled, None)))
    assert one == two and one != whole


def test_the_running_scale_by_the_reference():
    policy, rng, expected = make_policy(**{"critic.tau": 0.1}), np.random.default_rng(0), 1.0
    for spread in (0.01, 30, 30, 5, 100):
        q = rng.normal(7, spread, 101).astype(np.float32)
        policy.follow(torch.from_numpy(q))
        low, high = np.percentile(q, [5, 95])
        expected += 0.1 * (max(high - low, 1.0) - expected)
        assert float(policy.scale) == pytest.approx(expected, rel=1e-5)
    assert expected > 20


def learner_of(*more):
    return make_learner(*(f"{k}={v}" for k, v in (TDMPC2 | {"planner.horizon": 2}).items()), *more)


def test_targets_are_the_smaller_of_two_drawn_heads_at_the_policys_action_of_the_latent():
    learner = learner_of("critic.members=5")
    batch = draw(linear_system(1), np.random.default_rng(0), n_step=1)
    nn.init.normal_(learner.target_critic.q.biases[-1])            # heads that differ
    twin, b = copy.deepcopy(learner), {k: torch.from_numpy(v) for k, v in batch.items()}
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        z = twin.agent.world_model.encode(twin.agent.normalizer.obs(b["bootstrap_obs"]))
        noise = torch.randn((*z.shape[:2], 1, 2, 2), generator=generator)[:, :, 0, 0]
        mean, log_std = twin.agent.policy(z)
        members = twin.target_critic.action_value(z, (mean + log_std.exp() * noise).tanh())
        one, two = torch.randperm(5, generator=generator)[:2].tolist()
        y = td_target(b["n_step_return"], b["discount"], torch.minimum(members[one], members[two]))
        mean_of_all = td_target(b["n_step_return"], b["discount"], members.mean(0))
    out = learner.update_model(batch)
    assert float(out["value/target_mean"]) == pytest.approx(float(y[b["value_mask"] > 0].mean()), rel=1e-4)
    assert abs(float(mean_of_all.mean() - y.mean())) > 1e-2 * abs(float(y.mean()))


def test_the_policys_update_moves_the_policy_alone():
    learner, data, rng = learner_of("policy.horizon=4"), linear_system(1), np.random.default_rng(0)
    before = {k: v.clone() for k, v in learner.agent.state_dict().items()}
    for distil in (False, True):
        out = learner.update_policy({**data.chunks(data.draw(rng, 64), 4, 3, False), "online": np.zeros(64, bool)}, distil=distil)
    moved = {k for k, v in learner.agent.state_dict().items() if not torch.equal(v, before[k])}
    assert math.isfinite(float(out["loss/policy"])) and moved and all(k.startswith("policy.net.") for k in moved)
    assert all(p.grad is None for p in (*learner.agent.world_model.parameters(), *learner.agent.critic.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(learner.agent.policy.parameters(), learner.policy.parameters(), strict=True))        # ema 0


def test_a_learner_of_its_own_updates_the_policy_from_the_weights_it_is_sent():
    """As under Ray: the model's learner publishes its part, the policy's loads it; where it does not, it learns from older ones."""
    one, model, policy, stale = (learner_of("policy.horizon=4", "world_model.lr=1e-2") for _ in range(4))
    data, rng = linear_system(1), np.random.default_rng(0)
    batch, chunks = draw(data, rng, n_step=1), {**data.chunks(data.draw(rng, 64), 4, 3, False), "online": np.zeros(64, bool)}
    for learner in (one, model):
        for _ in range(3):
            learner.update_model(batch)
    load_parts(policy, {"model": model.agent.flat("model")})
    for learner in (one, policy, stale):
        learner.rng.manual_seed(1)
        learner.update_policy(chunks, distil=True)
        learner.update_policy(chunks, distil=True)
    np.testing.assert_array_equal(policy.agent.flat("policy"), one.agent.flat("policy"))
    assert not np.array_equal(stale.agent.flat("policy"), one.agent.flat("policy"))


@torch.inference_mode()
def test_plans_end_in_q_of_the_acting_policys_action_and_begin_with_its_rollout():
    learner = learner_of("planner.proposals=4", "planner.gaussian=4", "planner.elites=3", "resources.precision=fp32")
    agent, search = learner.agent, Planner(learner.cfg, learner.agent).search
    assert agent.critic.policy is None
    search.agent = agent
    z, actions = torch.rand(5, 16), torch.rand(5, 2, 2) * 2 - 1
    end, rewards, stops = agent.world_model.rollout(z, actions)
    total, weight = torch.zeros(5), torch.ones(5)
    for k in range(2):
        total, weight = total + weight * rewards[:, k] * agent.world_model.reward_scale, weight * 0.5 * (1 - stops[:, k].sigmoid())
    expected = total + weight * agent.critic.action_value(end[:, -1], agent.policy.mean(end[:, -1]))
    torch.testing.assert_close(search.rollout(agent.world_model.z_in(z), actions), expected)
    assert not torch.allclose(expected, total + weight * agent.critic(end[:, -1]), atol=1e-4)
    obs, noise = torch.randn(3, 2), torch.randn(3, 6, 2, 2)
    drawn, latent = agent.propose(obs, noise, 1), agent.world_model.encode(obs)[:, None].expand(-1, 6, -1)
    for k in range(2):
        mean, log_std = agent.policy(latent)
        torch.testing.assert_close(drawn[:, :, k], (mean + log_std.exp() * noise[:, :, k]).tanh())
        latent = agent.world_model.step(latent, drawn[:, :, k])[0]
    torch.testing.assert_close(agent.act(obs, noise[:, :1], 1)[:, 0], agent.policy.mean(agent.world_model.encode(obs)))


def test_a_run_trains_evaluates_and_acts_from_its_folder(tmp_path):
    """Also as its own policy of the offline phase's end, which is that of an encoder that has moved since; it cannot be written as a file."""
    run = tmp_path / "run"
    cfg = small(run_dir=str(run), serial=True, data__source=str(write_data(tmp_path / "data.hdf5")), online__env_steps=120).replace(TDMPC2)
    summary = train(cfg, PointEnv)
    assert all(math.isfinite(summary["scores"][mode]["mean"]) for mode in ("bc", "policy", "mpc"))
    assert summary["updates"] == 60 + int(cfg.online.updates_per_step * summary["env_steps"])
    obs = np.array([0.5, -0.5, 0.1, 0.0], np.float32)
    actions = {mode: load_run(run, mode).act(obs) for mode in ("bc", "policy", "mpc")}
    assert all(np.abs(a).max() <= 1 for a in actions.values()) and not np.array_equal(actions["bc"], actions["policy"])
    agent = load_run(run).planner.agent
    frozen = saved_bc(newest(run / "checkpoints"))
    assert frozen.shape == agent.flat().shape and not np.array_equal(frozen, agent.flat())
    with pytest.raises(ExportError, match="policy.kind: tdmpc2.*modip serve"):
        export_run(run, "safetensors")
