"""Rows of a policy batch planned anew."""

import numpy as np
import pytest
import torch

from modip_ray.learning.reanalyze import Reanalyze
from modip_ray.planning.planner import trust_region
from modip_ray.planning.search import Found
from tests.learning.test_learner import draw_chunks, linear_system, make_learner


def batch(rows: int = 40):
    return draw_chunks(linear_system(1), np.random.default_rng(0), rows) | {"online": np.arange(rows) >= rows // 2}


def test_accepted_plans_take_the_place_of_what_was_done(monkeypatch):
    """Half of the 20 online rows are planned; the guard lets every second of these plans through."""
    learner = make_learner("distill.reanalyze=0.5", "policy.horizon=3", "guard.trust=0.1", "guard.trust_final=0.3", "guard.widen_steps=100")
    b = {k: torch.from_numpy(v) for k, v in batch().items()}
    chunk, mask = torch.zeros(40, 3, 2), torch.ones(40, 3)
    asked = {}

    def search(s, noise, warm, has_warm, limits):
        asked.update(rows=s, limits=limits.tolist(), warm=has_warm.any())
        n = len(s)
        return Found(torch.full((n, 2, 2), 0.7), torch.zeros(n, 2, 2), torch.ones(n), torch.arange(n) % 2 == 0)
    monkeypatch.setattr(learner.reanalyze, "search", type("S", (), {"agent": learner.agent, "__call__": staticmethod(search)})())
    new, new_mask, planned = learner.reanalyze(b["obs"], chunk, mask, b["online"], 50)
    assert planned.nonzero()[:, 0].tolist() == [20, 22, 24, 26, 28] and torch.equal(asked["rows"], b["obs"][20:30])
    assert asked["limits"] == pytest.approx(trust_region(learner.cfg, 50)) and asked["limits"][1] == pytest.approx(0.2) and not asked["warm"]
    assert (new[planned, :2] == 0.7).all() and (new[planned, 2] == 0).all() and (new[~planned] == 0).all()
    assert new_mask[planned].tolist() == [[1, 1, 0]] * 5 and (new_mask[~planned] == 1).all()
    assert (chunk == 0).all() and (mask == 1).all(), "the batch itself is left alone"


def test_the_policy_imitates_plans_of_now(monkeypatch):
    """Plans that say 0.5 everywhere: with reanalyze the policy moves there, whatever the replay holds; offline it does not."""
    learner = make_learner("distill.reanalyze=1.0", "pretrain.policy_updates=0", "guard.min_gain=-1e9")
    plan = Reanalyze.__call__
    monkeypatch.setattr(Reanalyze, "__call__", lambda self, obs, chunk, *rest: ((out := plan(self, obs, chunk, *rest))[0] * 0 + 0.5, *out[1:]))
    rows = batch() | {"online": np.ones(40, bool)}
    before = float(learner.update_policy(rows, distil=False)["loss/policy"])
    for _ in range(150):
        metrics = learner.update_policy(rows, distil=True)
    assert float(metrics["distill/reanalyzed"]) == 1.0 and float(metrics["loss/policy"]) < 0.3 * before
    norm, policy = learner.agent.normalizer, learner.agent.policy
    actions = policy.sample(norm.obs(torch.from_numpy(rows["obs"])), torch.zeros(40, 1, 2, 2), 4)
    assert (actions - 0.5).abs().mean() < 0.1


def test_a_share_of_nothing_plans_nothing():
    assert make_learner().reanalyze is None
    learner = make_learner("distill.reanalyze=0.5")
    rows = batch() | {"online": np.zeros(40, bool)}
    assert float(learner.update_policy(rows, distil=True)["distill/reanalyzed"]) == 0
