"""policy.kind: dsrl: the noise's actor, its critic and temperature, and a run of it."""

import math

import numpy as np
import pytest
import torch

from modip_ray.baselines.dsrl import BOUND, TARGET_ENTROPY, SteeredPolicy
from modip_ray.config import ConfigError, load
from modip_ray.export import ExportError, export_run
from modip_ray.learning.updater import Updater
from modip_ray.model.diffusion import DiffusionPolicy
from modip_ray.policy import load as load_run
from modip_ray.run import train
from tests.baselines.test_dql import DO, STEPS, H, arguments
from tests.baselines.test_tdmpc2 import DA, Quadratic
from tests.fakes import PointEnv, small, write_data
from tests.learning.test_learner import draw_chunks, linear_system, make_learner

DSRL = {"policy.kind": "dsrl", "critic.target": "policy_q", "critic.target_reduce": "min_two", "critic.n_step": 1, "planner.kind": "action_values",
        "planner.gaussian": 0, "planner.horizon": 1, "planner.proposals": 1, "planner.elites": 1, "planner.iterations": 0, "guard.value_penalty": 0.0,
        "guard.min_gain": -1e9}
LEARNED = ("actor.", "noise_q.", "log_temperature")


class Known:
    """Q of test_tdmpc2.py, its two heads a constant apart, on latents that are the observations."""

    q, shift, scale = Quadratic(), torch.tensor(0.0), torch.tensor(1.0)

    def action_value(self, z, action):
        return self.q(torch.cat([z, action], -1))

    @staticmethod
    def encode(obs):
        return obs


def make_policy(seed=0):
    torch.manual_seed(seed)
    cfg = load(overrides=["policy.horizon=2", "planner.horizon=2", "policy.width=32", "policy.blocks=1", "policy.denoising_steps=8", "critic.members=2"])
    return SteeredPolicy(cfg, DO, DA)


def losses(policy, args):
    return policy.steer(Known(), Known(), STEPS, *args)


def test_plain_noise_until_the_first_online_update_then_bounded():
    policy = make_policy()
    plain = DiffusionPolicy(DO, DA, H, 8, 32, 1)
    plain.load_state_dict({k: v for k, v in policy.state_dict().items() if k in plain.state_dict()})
    obs, noise = arguments()[0], 5 * torch.randn(64, 3, H, DA)
    assert torch.equal(policy.sample(obs, noise, STEPS), plain.sample(obs, noise, STEPS))
    losses(policy, arguments())
    drawn, _ = policy.steered(obs, noise)
    assert drawn.abs().max() <= BOUND and torch.equal(policy.sample(obs, noise, STEPS), plain.sample(obs, drawn, STEPS))


def test_the_likelihood_is_that_of_the_squashed_gaussian():
    policy = make_policy().double()
    obs, noise = arguments()[0].double(), torch.randn(64, 5, H, DA, dtype=torch.float64)
    drawn, found = policy.steered(obs, noise)
    mean, log_std = policy.actor(obs)[:, None].double().chunk(2, -1)
    squashed = torch.distributions.TransformedDistribution(
        torch.distributions.Normal(mean, log_std.exp()), [torch.distributions.TanhTransform(), torch.distributions.AffineTransform(0, BOUND)])
    torch.testing.assert_close(found, squashed.log_prob(drawn.flatten(2)).sum(-1), rtol=1e-4, atol=1e-3)


def test_gradients_reach_what_is_learned_and_nothing_else():
    policy = make_policy()
    losses(policy, arguments()).backward()
    with_gradient = {name for name, p in policy.named_parameters() if p.grad is not None}
    assert with_gradient == {name for name, _ in policy.named_parameters() if name.startswith(LEARNED)} and Known.q.level.grad is None
    policy.zero_grad()
    policy.loss(*arguments()).backward()
    assert not any(name.startswith(LEARNED) for name, p in policy.named_parameters() if p.grad is not None)


def test_the_noise_it_learns_becomes_actions_that_q_values():
    """A policy whose actions spread over the box: with plain noise an action is anywhere, with the learned one near the best of its observation."""
    policy = make_policy()
    opt = torch.optim.Adam(policy.parameters(), 3e-3)
    for step in range(300):
        opt.zero_grad()
        policy.loss(*arguments(seed=step)).backward()
        opt.step()
    base = {k: v.clone() for k, v in policy.state_dict().items() if not k.startswith((*LEARNED, "steering"))}
    obs, noise = arguments(512, 999)[0], torch.randn(512, 1, H, DA)

    def distance():
        return (policy.sample(obs, noise, STEPS)[:, 0, 0] - obs[:, :DA]).square().sum(-1).mean()
    before = distance()
    opt = torch.optim.Adam(policy.parameters(), 3e-3)
    for step in range(1000):
        opt.zero_grad()
        losses(policy, arguments(seed=1000 + step)).backward()
        opt.step()
    entropy = -policy.steered(obs, noise)[1].mean()
    assert distance() < 0.5 * before and abs(float(entropy.detach()) - TARGET_ENTROPY) < 1, "the temperature keeps the noise from shrinking to a point"
    assert all(torch.equal(v, policy.state_dict()[k]) for k, v in base.items())


def test_online_updates_leave_the_acting_diffusion_policy_alone():
    """Also where the new loss has gradients a thousand times those of the old one; an update that is not made would leave it alone, too."""
    learner, rows = make_learner(*(f"{k}={v}" for k, v in DSRL.items()), "pretrain.policy_updates=30"), draw_chunks(linear_system(1), np.random.default_rng(0))
    updater = Updater(learner.cfg, learner)
    for _ in range(30):
        updater.update("policy", rows)
    offline = {k: v.clone() for k, v in learner.agent.policy.state_dict().items()}
    assert float(offline["steering"]) == 0 and any(not torch.equal(v, learner.policy.state_dict()[k]) for k, v in offline.items()), "an average lags behind"
    learner.agent.critic.scale.fill_(1e-3)
    for _ in range(5):
        updater.update("policy", rows)
    metrics = updater.take_metrics()
    assert metrics["guard/skipped_policy"] == 0 and updater.snapshots["policy"].count == 30
    for policy in (learner.policy, learner.agent.policy):
        moved = {k for k, v in policy.state_dict().items() if not torch.equal(v, offline[k])}
        assert any(k.startswith("actor.") for k in moved) and all(k.startswith((*LEARNED, "steering")) for k in moved)
        assert float(policy.steering) > 0
    assert all(p.grad is None for p in (*learner.agent.world_model.parameters(), *learner.agent.critic.parameters()))


@pytest.mark.parametrize(("wrong", "words"), [
    ({"critic.target": "value", "critic.target_reduce": "mean", "planner.kind": "mppi"}, "policy.kind.*policy_q"),
    ({"distill.reanalyze": 0.5}, "distill.reanalyze.*offline only"),
    ({"distill.rule": "realised"}, "distill.rule.*imitates nothing online"),
])
def test_settings_that_do_not_go_together_are_refused(wrong, words):
    with pytest.raises(ConfigError, match=words):
        load(overrides=[f"{k}={v}" for k, v in (DSRL | wrong).items()])


@pytest.mark.parametrize("compile", [False, True])
def test_a_run_keeps_its_bc_policy_and_goes_on_where_it_stopped(tmp_path, compile, traced):
    run = tmp_path / "run"
    cfg = small(run_dir=str(run), serial=True, data__source=str(write_data(tmp_path / "data.hdf5")), online__env_steps=120,
                resources__compile=compile).replace(DSRL)
    train(cfg, PointEnv)
    summary = train(cfg.replace({"online.env_steps": 200}), PointEnv)
    assert all(math.isfinite(summary["scores"][mode]["mean"]) for mode in ("bc", "policy", "mpc")) and summary["env_steps"] >= 200
    bc, now = (load_run(run, mode).planner.agent.policy for mode in ("bc", "policy"))
    assert float(bc.steering) == 0 and float(now.steering) > 0
    same = {k for k, v in bc.state_dict().items() if torch.equal(v, now.state_dict()[k])}
    assert same == {k for k in bc.state_dict() if not k.startswith((*LEARNED, "steering"))}
    assert bool(traced) is compile
    with pytest.raises(ExportError, match="policy.kind: dsrl.*modip serve"):
        export_run(run, "safetensors")
