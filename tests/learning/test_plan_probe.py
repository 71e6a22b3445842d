"""What plans are measured by, on a small agent and on numbers worked out by hand."""

import numpy as np
import pytest
import torch

from modip_ray.learning.build import blank_agent
from modip_ray.learning.evaluation import Job, run_job
from modip_ray.learning.plan_probe import DECISIONS, SCALARS, PlanProbe, distances, summary, watched
from modip_ray.planning.planner import Planner
from modip_ray.planning.search import Noise
from modip_ray.tasks.episode import Episode
from tests.fakes import STEPS, PointEnv, small

CFG = small(critic__gamma=0.9)


@pytest.fixture(scope="module")
def agent():
    torch.manual_seed(0)
    return blank_agent(CFG, 4, 2, torch.device("cpu"))


def probe_of(agent, episodes, cfg=CFG):
    """A probe that saw the planner's plans for every step of the episodes, and those plans."""
    planner = Planner(cfg, agent)
    probe = PlanProbe(planner, seed=3)
    for t in range(max(e.length for e in episodes)):
        slots = np.array([j for j, e in enumerate(episodes) if t < e.length])
        reset = np.full(len(slots), t == 0)
        probe.add(slots, planner.plan(np.stack([episodes[j].observations[t] for j in slots]), slots.tolist(), reset), reset)
    return planner, probe


def episode(length, terminated, rewards=None):
    rng = np.random.default_rng(length)
    rewards = np.ones(length) if rewards is None else rewards
    return Episode(rng.normal(size=(length + 1, 4)).astype(np.float32), np.zeros((length, 2), np.float32), np.asarray(rewards, np.float32), terminated)


def test_realised_returns_are_discounted_and_bootstrapped_at_a_time_limit_only(agent):
    ended, cut = episode(3, True, [1.0, 2.0, 4.0]), episode(2, False, [1.0, 2.0])
    planner, probe = probe_of(agent, [ended, cut])
    realised = probe.realised([ended, cut], 0.9)
    assert realised[0].tolist() == pytest.approx([1 + 0.9 * 2 + 0.81 * 4, 2 + 0.9 * 4, 4.0, 0.0])
    value = agent.critic(agent.world_model.encode(agent.normalizer.obs(torch.as_tensor(cut.observations[-1:])))).mean().item()
    assert realised[1].tolist() == pytest.approx([1 + 0.9 * 2 + 0.81 * value, 2 + 0.9 * value, value], rel=1e-5)


def test_decisions_whose_return_is_mostly_the_value_again_are_left_out(agent):
    ended, cut = episode(3, True), episode(30, False)
    _, probe = probe_of(agent, [ended, cut])
    chosen = probe.choose([ended, cut], 0.9, 1)
    assert chosen == [(0, 0), (0, 1), (0, 2)] + [(1, k) for k in range(9)]                  # 0.9 ** 22 < 0.1 < 0.9 ** 21
    short = episode(5, False)
    assert len(probe_of(agent, [short])[1].choose([short], 0.9, 1)) == 5                    # there are no others


def test_predictions_are_those_of_the_executed_plans_and_the_planner_does_not_notice(agent):
    episodes = [episode(12, True), episode(7, True)]
    planner, probe = probe_of(agent, episodes)
    state, warm = planner.rng.get_state(), planner.warm.table.clone()
    found = probe.measure(episodes)
    assert set(found) == {"plan_pred", "plan_return", "plan_acted", *SCALARS} and all(len(v) == 19 for v in found.values())
    assert torch.equal(planner.rng.get_state(), state) and torch.equal(planner.warm.table, warm)
    z = agent.world_model.encode(agent.normalizer.obs(torch.as_tensor(episodes[1].observations[2:3])))
    plan = agent.normalizer.action(torch.as_tensor(probe.plans[1][2]))[None, None]
    with planner.search.precision():
        expected = planner.search.returns(z, plan).mean().item()
    assert found["plan_pred"][12 + 2] == pytest.approx(expected, rel=1e-2, abs=1e-3)        # bf16 where the machine has it
    assert found["plan_return"][12 + 2] == pytest.approx(sum(0.9 ** k for k in range(5)), rel=1e-5)
    assert found == probe_of(agent, episodes)[1].measure(episodes)


def test_all_candidates_of_a_search_are_kept_and_its_plan_is_the_same(agent):
    planner, p = Planner(CFG, agent), CFG.planner
    rng = torch.Generator().manual_seed(1)
    noise = Noise(torch.randn(6, p.proposals, CFG.policy.horizon, 2, generator=rng), torch.randn(6, p.iterations, p.gaussian, p.horizon, 2, generator=rng))
    arguments = (torch.randn(6, 4, generator=rng), noise, torch.zeros(6, p.horizon, 2), torch.zeros(6, dtype=torch.bool), torch.tensor([0.2, 0.2]))
    search, scored = watched(planner.search)
    with torch.inference_mode():
        assert torch.equal(search(*arguments).plan, planner.search(*arguments).plan)
    assert [a.shape[1] for a, _ in scored] == [p.proposals + 1, *([p.gaussian] * p.iterations), 1]


def test_what_is_said_of_refined_plans_does_not_depend_on_whether_the_guard_lets_them_through(agent):
    """With a gain that no plan has, the policy's own proposal is executed, whose distance from itself would be 0."""
    episodes = [episode(12, True)]
    never, always = (probe_of(agent, episodes, small(critic__gamma=0.9, guard__min_gain=least))[1].measure(episodes) for least in (1e9, -1e9))
    assert never["plan_acted"] == [0.0] * 12 and always["plan_acted"] == [1.0] * 12
    first = 0                                                       # later ones begin from another last plan
    assert never["plan_distance"][first] == always["plan_distance"][first] > 0 and never["plan_spread"][first] == always["plan_spread"][first]


def test_distances_by_hand():
    proposals = torch.tensor([[[[0.0, 0.0]], [[0.6, 0.8]], [[3.0, 4.0]]]])                 # (1, 3, 1, 2): 1 and 4 apart
    found = distances(torch.tensor([[[0.6, 1.8]]]), proposals)
    assert found["plan_distance"].item() == pytest.approx(1 / 2 ** 0.5) and found["proposal_distance"].item() == pytest.approx((1 + 1 + 4) / 3 / 2 ** 0.5)
    assert distances(torch.zeros(1, 1, 2), proposals[:, :1])["proposal_distance"].isnan().all()


def test_one_critic_has_no_disagreement_and_few_candidates_no_rejected_one():
    cfg = small(critic__members=1, planner__iterations=0, planner__elites=4)
    agent = blank_agent(cfg, 4, 2, torch.device("cpu"))
    episodes = [episode(4, True)]
    row = summary([probe_of(agent, episodes, cfg)[1].measure(episodes)])
    assert row["plan_spread"] is None and row["plan_spread_rejected"] is None and row["plan_distance"] >= 0
    several = small(planner__iterations=0, planner__elites=5)
    agent = blank_agent(several, 4, 2, torch.device("cpu"))
    row = summary([probe_of(agent, episodes, several)[1].measure(episodes)])
    assert row["plan_spread"] is not None and row["plan_spread_rejected"] is None            # four proposals and the warm start are all elites


def test_an_evaluation_measures_plans_in_mpc_mode_only(agent):
    outcome = run_job(CFG, agent, PointEnv, Job("mpc", (1, 2, 3, 4, 5)), 0, None)
    assert len(outcome.plans["plan_pred"]) == min(DECISIONS, len([1 for n in outcome.lengths for k in range(n) if n < STEPS or 0.9 ** (n - k) <= 0.1]))
    assert run_job(CFG, agent, PointEnv, Job("policy", (1, 2)), 0, None).plans == {}


def test_summary_joins_the_jobs():
    part = {"plan_pred": [1.0, 2.0], "plan_return": [0.0, 3.0], "plan_acted": [1.0, 0.0], **{name: [1.0, 3.0] for name in SCALARS}}
    other = {"plan_pred": [3.0], "plan_return": [6.0], "plan_acted": [1.0], **{name: [float("nan")] for name in SCALARS}}
    row = summary([part, {}, other])
    assert row["plan_pred"].tolist() == [1.0, 2.0, 3.0]
    assert row["plan_acted"].tolist() == [1, 0, 1] and row["plan_corr"] == pytest.approx(1.0) and row["plan_bias"] == -1.0
    assert all(row[name] == 2.0 for name in SCALARS)
    assert summary([]) == summary([{}]) == {} and summary([other])["plan_corr"] is None and summary([other])["plan_spread"] is None
