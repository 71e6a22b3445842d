import math

import numpy as np
import pytest
import torch
from torch import nn

from modip_ray.planning.planner import WarmStarts, widened

OBS = np.random.default_rng(0).normal(0, 1, (5, 3)).astype(np.float32)
NEW, OLD = np.ones(5, bool), np.zeros(5, bool)
TARGET = torch.tensor([[0.5, -0.4], [0.2, 0.6], [-0.5, 0.1]])       # (H, Da) of the fake task below


def fake_task(planner, offsets=(0.0, 0.0, 0.0)):
    """A latent that counts steps, reward -(a - TARGET_k)^2, V = each member's offset, a policy that samples 0.1 x noise."""
    agent = planner.agent

    def advance(z, a):
        k = z[:, 0].long().clamp(max=2)
        return z + 1, -(a - TARGET[k]).square().sum(-1), torch.full((len(z),), -100.0)

    agent.world_model.z_in, agent.world_model.advance, agent.world_model.encode = nn.Identity(), advance, lambda s: torch.zeros(len(s), 16)
    agent.critic.forward = lambda z: torch.tensor(offsets)[:, None].expand(-1, len(z))
    agent.policy.sample = lambda s, noise, steps: (0.1 * noise).clamp(-1, 1)
    return planner


def test_widened_is_linear_and_stays_between():
    assert [widened(1.0, 3.0, p) for p in (-1, 0, 0.25, 1, 9)] == [1.0, 1.0, 1.5, 3.0, 3.0]


def test_trust_region_widens_with_environment_steps(make_planner):
    planner = make_planner()
    assert planner.trust_region()[0] == pytest.approx(0.3)
    planner.load(3, planner.agent.flat(), 500)
    assert planner.trust_region()[0] == pytest.approx(0.4) and planner.version == 3
    planner.load(4, planner.agent.flat(), 10**6)
    assert planner.trust_region()[0] == pytest.approx(0.5)
    assert make_planner("guard.widen_steps=0").trust_region()[0] == pytest.approx(0.5)


def test_output_shapes_and_bounds(make_planner):
    planner = make_planner()
    planner.agent.normalizer.action_low.copy_(torch.tensor([-0.4, 1.0]))
    planner.agent.normalizer.action_high.copy_(torch.tensor([0.4, 7.0]))
    policy = planner.plan(OBS, range(5), NEW, mode="policy")
    assert policy.actions.shape == (5, 2, 2) and policy.plans.shape == (5, 4, 2) and np.isnan(policy.gains).all()
    for explore in (False, True):
        mpc = planner.plan(OBS, range(5), NEW, explore=explore)
        assert mpc.actions.shape == (5, 1, 2) and mpc.plans.shape == (5, 3, 2) and mpc.gains.shape == (5,) and np.isfinite(mpc.gains).all()
        for actions in (policy.actions, policy.plans, mpc.actions, mpc.plans):
            assert (actions >= np.array([-0.4, 1.0]) - 1e-5).all() and (actions <= np.array([0.4, 7.0]) + 1e-5).all()
            assert np.isfinite(actions).all()


def test_executes_the_first_actions_of_the_plan(make_planner):
    plan = make_planner("planner.n_action_steps=2").plan(OBS, range(5), NEW)
    np.testing.assert_array_equal(plan.actions, plan.plans[:, :2])


def test_the_same_seed_plans_the_same(make_planner):
    one, two, other = (make_planner(seed=s).plan(OBS, range(5), NEW).actions for s in (1, 1, 2))
    np.testing.assert_array_equal(one, two)
    assert not np.array_equal(one, other)


@pytest.mark.parametrize("obs, message", [
    (OBS[0], r"shape \(3,\), expected \(rows, 3\)"),
    (OBS[:, :2], r"shape \(5, 2\), expected \(rows, 3\)"),
    (np.where(np.arange(15).reshape(5, 3) == 7, np.nan, OBS), "slot c is nan in column 1"),
    (np.where(np.arange(15).reshape(5, 3) == 14, -np.inf, OBS), "slot e is -inf in column 2"),
])
def test_bad_observations_are_refused(make_planner, obs, message):
    for mode in ("mpc", "policy"):
        with pytest.raises(ValueError, match=message):
            make_planner().plan(obs, "abcde", NEW, mode=mode)


def test_returns_by_hand(make_planner):
    planner = fake_task(make_planner(), offsets=(1.0, 2.0, -5.0))
    planner.agent.world_model.reward_scale.fill_(10.0)
    actions = TARGET.repeat(1, 2, 1, 1)                             # (1, 2, 3, 2): two candidates
    actions[0, 1, 0, 0] += 1.0                                      # reward -1 at step 0 ...
    actions[0, 1, 2, 1] += 2.0                                      # ... and -4 at step 2
    out = planner.search.returns(torch.zeros(1, 16), actions)
    tail = torch.tensor([1.0, 2.0, -5.0])[:, None, None] * 0.9 ** 3
    torch.testing.assert_close(out, torch.tensor([[[0.0, -10.0 - 0.81 * 40.0]]]) + tail)


def test_each_row_is_scored_from_its_own_latent(make_planner):
    planner = make_planner()
    z, actions = torch.rand(3, 16).softmax(1) * 2, torch.rand(3, 4, 3, 2) * 2 - 1
    with torch.no_grad():
        whole = planner.search.returns(z, actions)
        assert whole.shape == (3, 3, 4)                             # (E, B, N)
        for b in range(3):
            for n in range(4):
                torch.testing.assert_close(planner.search.returns(z[b:b + 1], actions[b:b + 1, n:n + 1])[:, 0, 0], whole[:, b, n])


def test_a_predicted_termination_cuts_the_return(make_planner):
    planner = make_planner()
    agent = planner.agent
    logit = torch.tensor([math.log(1 / 3), 100.0, 0.0])             # probabilities 0.25, 1, ...
    agent.world_model.z_in = nn.Identity()
    agent.world_model.advance = lambda z, a: (z + 1, torch.ones(len(z)), logit[z[:, 0].long()])
    agent.critic.forward = lambda z: torch.full((3, len(z)), 1000.0)
    out = planner.search.returns(torch.zeros(1, 16), torch.zeros(1, 1, 3, 2))
    torch.testing.assert_close(out, torch.full((3, 1, 1), 1 + 0.9 * 0.75), rtol=1e-4, atol=1e-4)
    agent.world_model.terminates.fill_(0.0)                         # data without terminations: the head is ignored
    out = planner.search.returns(torch.zeros(1, 16), torch.zeros(1, 1, 3, 2))
    torch.testing.assert_close(out, torch.full((3, 1, 1), 1 + 0.9 + 0.81 + 0.729 * 1000))


def test_guarded_gain_by_hand(make_planner):
    reference = torch.tensor([[1.0], [10.0], [4.0]])                # (E, B) levels that differ by member
    members = torch.tensor([[[3.0, 2.0]], [[12.0, 14.0]], [[6.0, 4.0]]])                # gains 2, 2, 2 and 1, 4, 0
    mean, spread = 5 / 3, math.sqrt(((1 - 5 / 3) ** 2 + (4 - 5 / 3) ** 2 + (5 / 3) ** 2) / 2)
    out = make_planner("guard.value_penalty=0.5").search.guarded_gain(members, reference)
    torch.testing.assert_close(out, torch.tensor([[2.0, mean - 0.5 * spread]]))
    torch.testing.assert_close(make_planner("guard.value_penalty=0").search.guarded_gain(members, reference), torch.tensor([[2.0, mean]]))
    torch.testing.assert_close(make_planner("guard.value_reduce=min").search.guarded_gain(members, reference), torch.tensor([[2.0, 0.0]]))


@pytest.mark.parametrize("reduce", ["mean", "min"])
def test_an_offset_of_one_member_cancels(make_planner, reduce):
    planner = make_planner(f"guard.value_reduce={reduce}")
    members, offset = torch.randn(3, 2, 6), torch.tensor([100.0, -7.0, 0.0])
    plain = planner.search.guarded_gain(members, members.mean(-1))
    shifted = members + offset[:, None, None]
    torch.testing.assert_close(planner.search.guarded_gain(shifted, shifted.mean(-1)), plain, atol=1e-4, rtol=1e-4)


def test_one_member_has_no_disagreement(make_planner):
    out = make_planner("critic.members=1").search.guarded_gain(torch.tensor([[[3.0, 2.0]]]), torch.tensor([[1.0]]))
    torch.testing.assert_close(out, torch.tensor([[2.0, 1.0]]))


WIDE = ("planner.gaussian=128", "planner.elites=12", "planner.iterations=20", "guard.trust=2.0", "guard.trust_final=2.0")


def test_mpc_finds_the_optimum_of_a_known_task(make_planner):
    planner = fake_task(make_planner(*WIDE), offsets=(1.0, 50.0, -9.0))
    plan = planner.plan(OBS, range(5), NEW)
    np.testing.assert_allclose(plan.plans, np.broadcast_to(TARGET.numpy(), (5, 3, 2)), atol=0.06)
    assert (plan.gains > 0.5).all()                                 # the policy's own actions cost about 0.41 + 0.9 * 0.40 + 0.81 * 0.26
    np.testing.assert_array_equal(plan.actions, plan.plans[:, :1])


def test_the_trust_region_bounds_the_plan(make_planner):
    planner = fake_task(make_planner(*WIDE, "guard.trust=0.0"))
    proposals = []
    sample = planner.agent.policy.sample
    planner.agent.policy.sample = lambda *args: proposals.append(sample(*args)) or proposals[-1]
    plan = planner.plan(OBS, range(5), NEW).plans
    low, high = proposals[0][:, :, :3].amin(1).numpy(), proposals[0][:, :, :3].amax(1).numpy()
    assert (plan >= low - 1e-6).all() and (plan <= high + 1e-6).all()


def test_a_plan_below_the_threshold_is_not_executed(make_planner):
    proposals = []
    planner = fake_task(make_planner(*WIDE, "guard.min_gain=1000"))
    sample = planner.agent.policy.sample
    planner.agent.policy.sample = lambda *args: proposals.append(sample(*args)) or proposals[-1]
    for explore in (False, True):
        plan = planner.plan(OBS, range(5), NEW, explore=explore)
        np.testing.assert_allclose(plan.plans, proposals[-1][:, 0, :3].numpy(), atol=1e-6)
        np.testing.assert_array_equal(plan.actions, plan.plans[:, :1])                  # unexplored: the policy's own action


@pytest.mark.parametrize("mode", ["policy", "mpc"])
def test_the_policy_by_itself_executes_the_mean_of_its_samples(make_planner, mode):
    drawn, planner = [], fake_task(make_planner(*WIDE, "guard.min_gain=1000", "policy.samples=4"))
    sample = planner.agent.policy.sample
    planner.agent.policy.sample = lambda *args: drawn.append(sample(*args)) or drawn[-1]
    plan = planner.plan(OBS, range(5), NEW, mode)
    assert drawn[0].shape[1] == (4 if mode == "policy" else 6)      # of the planner's proposals the first ones
    np.testing.assert_allclose(plan.plans, drawn[0][:, :4].mean(1)[:, : plan.plans.shape[1]].numpy(), atol=1e-6)


@pytest.mark.parametrize("part", ["world_model", "critic"])
def test_with_nan_weights_the_policy_acts(make_planner, part):
    planner = make_planner()
    for p in getattr(planner.agent, part).parameters():
        p.fill_(float("nan"))
    drawn = []
    sample = planner.agent.policy.sample
    planner.agent.policy.sample = lambda *args: drawn.append(sample(*args)) or drawn[-1]
    plan = planner.plan(OBS, range(5), NEW, explore=True)
    np.testing.assert_allclose(plan.plans, drawn[0][:, 0, :3].numpy(), atol=1e-6)
    assert np.isfinite(plan.actions).all() and np.isnan(plan.gains).all() and planner.not_finite == 5
    plan = planner.plan(OBS, range(5), OLD)                         # and the warm starts hold no NaN afterwards
    assert np.isfinite(plan.plans).all() and planner.not_finite == 10


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_rows_whose_plan_is_not_finite_get_the_policys_own_action(make_planner, value):
    planner = fake_task(make_planner())
    planner.agent.world_model.encode = lambda s: torch.zeros(len(s), 16).index_put((torch.tensor([1, 3]), torch.tensor([1])), torch.tensor(1.0))
    planner.agent.critic.forward = lambda z: torch.where(z[:, 1] > 3, value, 0.0).expand(3, -1)      # fake latents count on: 1 + horizon
    drawn = []
    sample = planner.agent.policy.sample
    planner.agent.policy.sample = lambda *args: drawn.append(sample(*args)) or drawn[-1]
    plan = planner.plan(OBS, range(5), NEW, explore=True)
    assert np.isnan(plan.gains).tolist() == [False, True, False, True, False] and planner.not_finite == 2
    np.testing.assert_allclose(plan.plans[[1, 3]], drawn[0][[1, 3], 0, :3].numpy(), atol=1e-6)
    assert np.isfinite(plan.actions).all() and (plan.gains[[0, 2, 4]] > 0).all()


def test_exploration_adds_the_plans_spread(make_planner):
    planner = fake_task(make_planner(*WIDE, "planner.std_min=0.2", "guard.std_max=0.2", "guard.std_max_final=0.2"))
    obs = np.zeros((400, 3), np.float32)
    plan = planner.plan(obs, range(400), np.ones(400, bool), explore=True)
    added = plan.actions[:, 0] - plan.plans[:, 0]
    assert added.std() == pytest.approx(0.2, rel=0.1) and abs(added.mean()) < 0.03
    assert np.abs(plan.actions).max() <= 1.0


def warm_seen(planner, slots, reset):
    """The warm starts (B, H, Da) and their validity (B,) that a plan for these slots would begin with."""
    rows, known = planner.warm.index(slots, reset)
    return planner.warm.table[rows].numpy(), known.tolist()


def test_warm_starts_are_the_shifted_plan_of_the_same_slot(make_planner):
    planner = fake_task(make_planner())
    slots = [("worker", 7, i) for i in range(5)]
    assert planner.warm.index(slots, OLD)[1].tolist() == [False] * 5                    # never seen
    first = planner.plan(OBS, slots, NEW).plans
    table, known = warm_seen(planner, slots, np.array([False, True, False, False, False]))
    assert known == [True, False, True, True, True]                                    # a reset slot starts cold
    np.testing.assert_allclose(table, np.concatenate([first[:, 1:], first[:, 2:]], 1), atol=1e-6)
    table, known = warm_seen(planner, slots[::-1], OLD)                                 # keyed by slot, not by row
    assert known == [True] * 5
    np.testing.assert_allclose(table[::-1], np.concatenate([first[:, 1:], first[:, 2:]], 1), atol=1e-6)
    assert planner.warm.index([("worker", 8, 0)], [False])[1].tolist() == [False]       # another incarnation is another slot


def test_warm_starts_carry_the_plan_on(make_planner):
    """Without Gaussians the plan can only come from the proposals or the warm start; the warm start is the better one here."""
    planner = fake_task(make_planner("planner.gaussian=0", "planner.elites=1", "guard.trust=2.0"))
    planner.plan(OBS, range(5), NEW)
    planner.warm.table[:5] = TARGET
    np.testing.assert_allclose(planner.plan(OBS, range(5), OLD).plans, np.broadcast_to(TARGET.numpy(), (5, 3, 2)), atol=1e-6)
    planner.warm.table[:5] = TARGET
    assert np.abs(planner.plan(OBS, range(5), NEW).plans - TARGET.numpy()).max() > 0.2


def test_the_table_grows_and_forgets(make_planner):
    planner = fake_task(make_planner())
    obs = np.zeros((150, 3), np.float32)
    plans = planner.plan(obs, range(150), np.ones(150, bool)).plans
    planner.warm.forget(range(0, 150, 2))                           # every second slot's worker died
    assert len(planner.warm.rows) == 75
    table, known = warm_seen(planner, [1, 149, 0], [False] * 3)
    assert known == [True, True, False]
    np.testing.assert_allclose(table[:2], np.concatenate([plans[[1, 149], 1:], plans[[1, 149], 2:]], 1), atol=1e-6)
    planner.plan(obs, range(150), np.zeros(150, bool))


def test_forgetting_everything():
    warm = WarmStarts(3, 2, torch.device("cpu"))
    warm.index(["a", "b"], [True, True])
    warm.forget(["a", "b", "never seen"])
    assert warm.rows == {} and warm.index(["a"], [False])[1].tolist() == [False]


def test_slots_and_resets_must_match_the_rows(make_planner):
    with pytest.raises(ValueError):
        make_planner().plan(OBS, range(5), NEW[:4])


def test_time_is_accounted_by_part(make_planner):
    planner = make_planner()
    planner.plan(OBS, range(5), NEW)
    planner.plan(OBS, range(5), NEW, mode="policy")
    counts = planner.timer.snapshot()["counts"]
    assert counts["plan/search"] == counts["policy/ddim"] == 1
