import copy

import numpy as np
import pytest
import torch

from modip_ray.learning.updater import learner_tensors
from modip_ray.model.critic import td_target
from modip_ray.model.policy_critic import PolicyCritic
from modip_ray.planning.planner import Planner
from tests.learning.test_learner import draw, linear_system, make_learner

TARGET, TAIL = "critic.target=policy_q", "planner.tail=policy_q"


def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("head", ["regression", "two_hot"])
def test_action_values_depend_on_the_action_and_are_in_return_units(head):
    critic = make_learner(TARGET, f"critic.head={head}").agent.critic
    assert isinstance(critic, PolicyCritic) and critic.policy is None
    z, a = torch.randn(5, 3, 16), torch.randn(5, 3, 2)
    value = critic.action_value(z, a)
    assert value.shape == (2, 5, 3) and not torch.equal(value, critic.action_value(z, -a))
    assert critic.action_loss(z, a, torch.zeros(5, 3)).shape == (2, 5, 3)
    if head == "regression":
        critic.shift.fill_(100.0)
        critic.scale.fill_(10.0)
        torch.testing.assert_close(critic.action_value(z, a), 100 + 10 * value)
        at_own = critic.action_loss(z, a, critic.action_value(z, a)[0])
        torch.testing.assert_close(at_own[0], torch.zeros(5, 3), atol=1e-8, rtol=0)


def test_a_plan_that_ends_in_q_asks_the_latents_policy_and_is_the_same_each_time():
    critic = make_learner(TAIL).agent.critic
    z, asked = torch.randn(7, 16), []
    critic.policy.sample = lambda z, noise, steps: asked.append((noise.abs().sum().item(), steps)) or z[:, :6].view(7, 1, 3, 2)
    torch.testing.assert_close(critic.policy_value(z), critic.action_value(z, z[:, :2]))
    assert asked == [(0.0, 4)]                                      # no noise, the steps of acting


def test_targets_bootstrap_from_q_and_the_acting_policys_action():
    """Against the formula, each part by itself: the action is drawn for the observation behind the bootstrap."""
    learner, buffer = make_learner(TARGET), linear_system(1)
    batch = draw(buffer, rng())
    twin = copy.deepcopy(learner)
    b = {k: torch.from_numpy(v) for k, v in batch.items()}
    obs = twin.agent.normalizer.obs(b["bootstrap_obs"])
    with torch.no_grad():
        noise = torch.randn((obs.shape[0] * obs.shape[1], 1, 2, 2), generator=torch.Generator().manual_seed(0))
        action = twin.agent.policy.sample(obs.flatten(0, 1), noise, 4)[:, 0, 0].view(*obs.shape[:2], 2)
        y = td_target(b["n_step_return"], b["discount"], twin.target_critic.action_value(twin.agent.world_model.encode(obs), action).mean(0))
    out = learner.update_model(batch)
    assert float(out["value/target_mean"]) == pytest.approx(float(y[b["value_mask"] > 0].mean()), rel=1e-5)
    assert float(out["value/target_std"]) == pytest.approx(float(y[b["value_mask"] > 0].std(correction=0)), rel=1e-5)
    for p, q in zip(learner.agent.policy.parameters(), twin.agent.policy.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)            # the policy is asked, not taught


@pytest.mark.parametrize("settings, trained, idle", [
    ((TARGET,), ("critic.q.", "critic.net.", "world_model."), ("policy.",)),
    ((TAIL,), ("critic.q.", "critic.policy.", "critic.net."), ("policy.",)),
    ((TARGET, TAIL), ("critic.q.", "critic.policy.", "critic.net."), ("policy.",)),
])
def test_every_part_learns_in_the_model_stream(settings, trained, idle):
    learner, buffer, source = make_learner(*settings), linear_system(1), rng()
    before = {k: v.clone() for k, v in learner.agent.state_dict().items()}
    learner.update_model(draw(buffer, source))
    learner.update_model(draw(buffer, source))                      # the last layers start at nothing: those before them move with the second update
    moved = {k for k, v in learner.agent.state_dict().items() if not torch.equal(v, before[k])}
    for prefix in trained:
        names = {n for n, _ in learner.agent.named_parameters() if n.startswith(prefix)}
        assert names and names <= moved | {n for n in names if ".time_in." in n}, sorted(names - moved)
    assert not any(n.startswith(prefix) for prefix in idle for n in moved)
    assert {f"agent.{n}" for n in moved} <= set(learner_tensors(learner, "model"))  # published and saved with the model


def test_q_converges_to_the_discounted_return():
    """Reward 1 for ever and gamma 0.5: Q = V = 2, whatever the action."""
    from modip_ray.learning.replay import ReplayBuffer, Segment
    learner, buffer = make_learner(TARGET, TAIL, "world_model.lr=1e-2", "world_model.horizon=1"), ReplayBuffer(8, 2, 2, 0.5)
    for _ in range(8):
        buffer.add(Segment(np.zeros((2, 2), np.float32), np.zeros((1, 2), np.float32), np.ones(1, np.float32), False))
    for _ in range(200):
        learner.update_model(buffer.sequences(np.arange(8), 1, 1))
    with torch.no_grad():
        critic, z = learner.agent.critic, learner.agent.world_model.encode(learner.agent.normalizer.obs(torch.zeros(1, 2)))
        for value in (critic(z), critic.action_value(z, torch.zeros(1, 2))):
            torch.testing.assert_close(value, torch.full((2, 1), 2.0), atol=0.15, rtol=0)


def test_the_planner_ends_in_the_value_that_is_set():
    for settings, other in (((TAIL,), "forward"), ((TARGET,), "policy_value")):
        learner = make_learner(*settings, "planner.proposals=4", "planner.gaussian=4", "planner.elites=3")
        planner = Planner(learner.cfg, learner.agent)

        def refuse(*args):
            raise AssertionError("asked the other tail")
        setattr(planner.agent.critic, other, refuse)
        plan = planner.plan(np.zeros((3, 2), np.float32), range(3), np.ones(3, bool))
        assert np.isfinite(plan.actions).all() and np.isfinite(plan.gains).all()
