"""planner.kind: action_values and critic.target: planned_q: what PA-RL and DQL act with, PA-RL's targets and what its policy imitates."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from modip_ray.baselines.parl import ActionSearch
from modip_ray.config import ConfigError, load
from modip_ray.learning.plan_probe import watched
from modip_ray.model.agent import Agent
from modip_ray.planning.planner import Planner
from modip_ray.planning.search import Noise
from modip_ray.run import train
from modip_ray.start import offline_differences
from tests.fakes import PointEnv, small, write_data
from tests.learning.test_learner import draw, draw_chunks, linear_system, make_learner

PARL = {"planner.kind": "action_values", "planner.gaussian": 0, "planner.horizon": 1, "planner.proposals": 8, "planner.elites": 4, "planner.iterations": 10,
        "planner.n_action_steps": 1, "planner.temperature": 100.0, "critic.target": "planned_q", "critic.target_reduce": "min_two",
        "critic.n_step": 1, "distill.reanalyze": 1.0,
        "guard.value_penalty": 0.0, "guard.min_gain": -1e9}
ROWS, BEST, SCALE = 5, torch.tensor([0.6, -0.4]), 8.0


def overrides(**more):
    return [f"{k}={v}" for k, v in (PARL | {k.replace("__", "."): v for k, v in more.items()}).items()]


def search_of(q=lambda a: -(a - BEST).square().sum(-1), **more):
    """Over a known Q(a) in units of the return spread, three members of which differ by their level, and a policy that proposes what its noise says."""
    cfg = load(overrides=["policy.horizon=2", "critic.members=3", *overrides(distill__reanalyze=0, **more)])
    agent = SimpleNamespace(
        propose=lambda s, noise, steps: noise.clamp(-1, 1), normalizer=SimpleNamespace(obs_mean=torch.zeros(3)),
        world_model=SimpleNamespace(encode=lambda s: s),
        critic=SimpleNamespace(scale=SCALE, action_value=lambda z, a: torch.stack([SCALE * q(a) + i for i in (-1, 0, 4)])))
    return ActionSearch(cfg, agent)


def call(search, seed=0):
    p = search.cfg.planner
    start = torch.rand(ROWS, p.proposals, 2, 2, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    found = search(torch.zeros(ROWS, 3), Noise(start, torch.zeros(ROWS, p.iterations, 0, p.horizon, 2)), torch.zeros(ROWS, p.horizon, 2),
                   torch.zeros(ROWS, dtype=torch.bool), torch.tensor([0.2, 0.2]))
    return found, start


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_steps_the_best_of_the_policys_actions_is_taken_with_the_rest_of_its_chunk(mode):
    with mode():
        found, start = call(search_of(planner__iterations=0, planner__horizon=2))
    top = (start[:, :, 0] - BEST).square().sum(-1).argmin(1)
    assert torch.equal(found.plan, start[torch.arange(ROWS), top]) and found.accepted.all()
    gain = -SCALE * (start[:, :, 0] - BEST).square().sum(-1)
    torch.testing.assert_close(found.gain, gain.amax(1) - gain.mean(1))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_steps_climb_q_as_far_as_their_size_says_and_stay_in_the_box(mode):
    with mode():
        best = call(search_of(planner__iterations=0))[0].plan[:, 0]
        climbed = call(search_of(planner__iterations=10, planner__step_size=0.01, planner__elites=1))[0].plan[:, 0]
        there = call(search_of(planner__iterations=100, planner__step_size=0.1))[0].plan[:, 0]
        edge = call(search_of(lambda a: a.sum(-1), planner__iterations=50, planner__step_size=0.1))[0].plan[:, 0]
    torch.testing.assert_close(climbed, BEST + (best - BEST) * (1 - 2 * 0.01) ** 10)         # a' = a + 0.01 * -2 (a - best), ten times
    torch.testing.assert_close(there, BEST.expand(ROWS, -1))
    assert (edge == 1).all()


def test_only_the_best_climb_and_the_best_of_them_wins():
    """A low hill that most proposals stand on, and a higher one that only a proposal far down its slope is on: with one elite it is never found."""
    def hills(a):
        return 1 - 4 * (a - 0.5).square().sum(-1), 5 - 20 * (a + 0.7).square().sum(-1)

    def q(a):
        return torch.maximum(*hills(a))
    few, _ = call(search_of(q, planner__elites=1, planner__iterations=200, planner__step_size=0.02), seed=3)
    many, start = call(search_of(q, planner__elites=8, planner__iterations=200, planner__step_size=0.02), seed=3)
    low, high = hills(start[:, :, 0])
    on_high = high > low
    reached = (many.plan[:, 0] + 0.7).abs().amax(-1) < 0.05
    assert torch.equal(reached, on_high.any(1)) and 0 < reached.sum() and (few.plan[:, 0] + 0.7).abs().amax(-1).lt(0.05).sum() < reached.sum()


def test_the_guard_lets_the_policys_first_action_through_where_q_promises_too_little():
    found, start = call(search_of(guard__min_gain=1e9))
    assert not found.accepted.any() and torch.equal(found.plan, start[:, 0, :1])


def imitate(search, own):
    start = torch.rand(len(own), search.cfg.planner.proposals, 2, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return *search.imitated(torch.zeros(len(own), 3), start, own, torch.Generator().manual_seed(0)), start


def test_a_rows_own_action_is_imitated_where_q_says_so_in_place_of_the_worst_kept_one():
    """On even rows it is better than all that the policy draws, on odd ones worse."""
    own = torch.ones(ROWS, 2, 2)
    own[::2, 0] = BEST + 0.02
    found, of_row, start = imitate(search_of(planner__iterations=0, planner__horizon=2, planner__temperature=1e6), own)
    distance = (start[:, :, 0] - BEST).square().sum(-1)
    top = start[torch.arange(ROWS), distance.argmin(1)]
    assert of_row.tolist() == [True, False] * 2 + [True]
    torch.testing.assert_close(found.plan, torch.where(of_row[:, None, None], own, top))
    torch.testing.assert_close(found.gain, -SCALE * ((found.plan[:, 0] - BEST).square().sum(-1) - distance.mean(1)))
    climbed, _, _ = imitate(search_of(planner__iterations=10, planner__step_size=0.01, planner__horizon=2, planner__temperature=1e6), own)
    torch.testing.assert_close(climbed.plan[:, 0], BEST + (found.plan[:, 0] - BEST) * (1 - 2 * 0.01) ** 10)
    assert torch.equal(climbed.plan[:, 1], found.plan[:, 1]), "the rest of a chunk stays"


def test_where_q_is_not_a_number_the_guard_refuses():
    found, _, start = imitate(search_of(lambda a: a.sum(-1) * torch.nan), torch.ones(ROWS, 1, 2))
    assert not found.accepted.any() and torch.equal(found.plan, start[:, 0, :1])


def test_it_is_drawn_by_softmax_of_q_over_the_spread():
    """Three actions are kept, the row's own takes the place of the third: shares of each in 20,000 draws."""
    rows = 20000
    search = search_of(planner__proposals=3, planner__elites=3, planner__iterations=0, planner__temperature=2.0)
    start = torch.tensor([[0.9, -0.4], [0.0, 0.1], [-0.9, 0.9]])[None, :, None].expand(rows, 3, 2, 2)
    own = torch.tensor([0.2, 0.2]).expand(rows, 1, 2)
    found, of_row = search.imitated(torch.zeros(rows, 3), start, own, torch.Generator().manual_seed(1))
    kept = torch.stack([start[0, 0, 0], start[0, 1, 0], own[0, 0]])
    expected = (-2 * (kept - BEST).square().sum(-1)).softmax(0)
    shares = torch.stack([(found.plan[:, 0] == a).all(-1).float().mean() for a in kept])
    torch.testing.assert_close(shares, expected, atol=0.01, rtol=0)
    assert float(of_row.float().mean()) == pytest.approx(float(shares[2]))


def test_a_rows_own_chunk_keeps_its_mask():
    """Each row draws one of four at random; all chunks end after their first action."""
    learner, found = make_learner(*overrides(planner__horizon=2, planner__temperature=0)), {}
    drawn = learner.reanalyze.search.imitated
    learner.reanalyze.search.imitated = lambda *a: found.setdefault("out", drawn(*a))
    rows = {k: torch.from_numpy(v) for k, v in draw_chunks(linear_system(1), np.random.default_rng(0), 40).items()}
    mask = torch.tensor([1.0, 0.0]).expand(40, 2)
    new, new_mask, planned = learner.reanalyze(rows["obs"], rows["chunk"], mask, torch.zeros(40, dtype=torch.bool), 0)
    plan, own = found["out"][0].plan, found["out"][1]
    assert torch.equal(planned, ~own) and torch.equal(new, plan) and 0 < own.sum() < 20
    assert torch.equal(new[own, 1], rows["chunk"][own, 1]) and not torch.equal(new[~own, 1], rows["chunk"][~own, 1])
    assert torch.equal(new_mask, torch.where(own[:, None], mask, torch.ones(40, 2)))


def test_a_planner_acts_with_it_and_its_candidates_can_be_watched():
    cfg = small(**{k.replace(".", "__"): v for k, v in PARL.items()})
    torch.manual_seed(0)
    planner = Planner(cfg, Agent(cfg, 4, 2))
    plan = planner.plan(np.random.default_rng(0).standard_normal((3, 4), dtype=np.float32), range(3), np.ones(3, bool))
    assert plan.actions.shape == plan.plans.shape == (3, 1, 2) and np.isfinite(plan.gains).all() and (plan.gains > 0).all()
    search, scored = watched(planner.search)
    with torch.inference_mode():
        search(torch.randn(3, 4), Noise(torch.randn(3, 8, 4, 2), torch.zeros(3, 10, 0, 1, 2)), torch.zeros(3, 1, 2), torch.zeros(3, dtype=torch.bool),
               torch.zeros(2))
    assert [a.shape[1] for a, _ in scored] == [8, 4, 1]


def test_targets_bootstrap_from_the_planners_action():
    learner = make_learner(*overrides(planner__step_size=0.05))
    batch = draw(linear_system(1), np.random.default_rng(0), n_step=1)
    asked = []
    plan = learner.reanalyze.plan
    learner.reanalyze.plan = lambda obs, steps: asked.append((obs, plan(obs, steps))) or asked[0][1]
    target = [learner.target_critic.action_value]
    used = []
    learner.target_critic.action_value = lambda z, a: used.append(a) or target[0](z, a)
    out = learner.update_model(batch)
    obs, found = asked[0]
    assert torch.equal(obs, learner.agent.normalizer.obs(torch.from_numpy(batch["bootstrap_obs"]))[:, :-1].flatten(0, 1)) and len(asked) == 1
    assert torch.equal(used[0][:, :-1].flatten(0, 1), found.plan[:, 0]) and math.isfinite(float(out["loss/value"]))


def test_no_target_is_made_of_what_was_not_planned():
    """Nothing is planned behind a sequence's last latent: neither Q nor V learns of a target there, whatever it would be."""
    losses = []
    for last in (0.0, 100.0):
        learner, batch = make_learner(*overrides()), draw(linear_system(1), np.random.default_rng(0), n_step=1)
        batch["n_step_return"] = batch["n_step_return"].copy()
        batch["n_step_return"][:, -1] += last
        losses.append({k: float(v) for k, v in learner.update_model(batch).items()})
    assert losses[0] == losses[1]


def test_what_bootstraps_is_higher_than_with_the_policys_own_action():
    """Of one and the same critic: the best of eight climbed actions is worth more than one that the policy draws."""
    batch = draw(linear_system(1), np.random.default_rng(0), rows=256, n_step=1)
    means = {target: float(make_learner(*overrides(critic__target=target, critic__target_reduce="mean", planner__step_size=0.05)).update_model(batch)
                           ["value/target_mean"]) for target in ("policy_q", "planned_q")}
    assert means["planned_q"] > means["policy_q"]


def test_the_policy_imitates_improved_actions_on_all_rows():
    learner, rows = make_learner(*overrides(planner__temperature=0)), draw_chunks(linear_system(1), np.random.default_rng(0), 400)
    assert float(learner.update_policy(rows, distil=True)["distill/reanalyzed"]) == pytest.approx(0.75, abs=0.1)         # but where it is a row's own, one of 4
    assert "distill/reanalyzed" not in learner.update_policy(rows, distil=False)


def test_a_start_whose_targets_planned_otherwise_is_not_taken_over_whole():
    base = {k.replace(".", "__"): v for k, v in PARL.items()}
    a, b = small(**base), small(**base | {"planner__iterations": 2})
    assert offline_differences(a, b) == ["planner.iterations"]
    free = {"critic__target": "policy_q"}
    assert offline_differences(small(**base | free), small(**base | free | {"planner__iterations": 2})) == []
    for target in ("policy_q", "planned_q"):                        # Q's offline targets ask for actions that are denoised in so many steps
        asked = small(**base | {"critic__target": target})
        assert offline_differences(asked, asked.replace({"policy.sampling_steps": 2})) == ["policy.sampling_steps"]
    assert offline_differences(small(), small(policy__sampling_steps=2)) == []


@pytest.mark.parametrize(("wrong", "words"), [
    (["planner.kind=action_values"], ["planner.kind", "critic.target: value", "planned_q"]),
    (overrides(planner__elites=9), ["planner.elites", "planner.proposals=8"]),
    (overrides(planner__elites=1), ["planner.elites", "at least 2", "distill.reanalyze"]),
    (overrides(planner__gaussian=3), ["planner.gaussian", "must be 0"]),
    (overrides(planner__n_action_steps=2, planner__horizon=2), ["planner.n_action_steps", "single actions"]),
    (overrides(distill__reanalyze=0.5), ["distill.reanalyze", "0 or 1"]),
    (overrides(policy__n_action_steps=2), ["policy.n_action_steps", "planner.horizon=1"]),
    (["critic.target=planned_q"], ["critic.target", "action_values"]),
    (overrides(resources__learner_replicas=2), ["resources.learner_replicas", "planned_q"]),
    (["distill.q_weight=1"], ["distill.q_weight", "needs Q"]),
    (["distill.q_weight=1", "critic.target=policy_q", "policy.kind=gaussian"], ["distill.q_weight", "diffusion"]),
])
def test_settings_that_do_not_go_together_are_refused(wrong, words):
    with pytest.raises(ConfigError) as error:
        load(overrides=wrong)
    assert all(word in str(error.value) for word in words), error.value


def test_a_run_begins_with_the_start_of_others_and_acts_with_q(tmp_path):
    data = str(write_data(tmp_path / "data.hdf5"))
    train(small(run_dir=str(tmp_path / "start"), serial=True, data__source=data, online__env_steps=0), PointEnv)
    cfg = small(run_dir=str(tmp_path / "run"), serial=True, data__source=data, online__env_steps=120, pretrain__start=str(tmp_path / "start"))
    summary = train(cfg.replace(PARL), PointEnv)
    assert all(math.isfinite(summary["scores"][mode]["mean"]) for mode in ("bc", "policy", "mpc"))
    assert summary["updates"] == 60 + int(cfg.online.updates_per_step * summary["env_steps"])
