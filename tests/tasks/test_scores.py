import json

import numpy as np
import pytest

from modip_ray.tasks.episode import Episode
from modip_ray.tasks.scores import bootstrap_ci, env_family, measure, normalized_score, paired_difference, score_summary


def test_normalized_score_hand_values():
    assert normalized_score("halfcheetah", 12135.0) == pytest.approx(100)
    assert normalized_score("hopper", -20.272305) == pytest.approx(0)
    assert normalized_score("kitchen", 1.0) == pytest.approx(25)
    assert normalized_score("walker2d", (4592.3 + 1.629008) / 2) == pytest.approx(50)
    assert normalized_score(None, 3.0) is None
    with pytest.raises(ValueError, match="hoper.*known: halfcheetah"):
        normalized_score("hoper", 1.0)


@pytest.mark.parametrize(("name", "family"), [("HalfCheetah-v4", "halfcheetah"), ("Walker2d-v5", "walker2d"), ("kitchen-complete-v0", "kitchen"),
                                              ("FrankaKitchen-v1", "kitchen"), ("mujoco/hopper/medium-v0", None), ("Pendulum-v1", None)])
def test_env_family(name, family):
    assert env_family(name) == family


def test_bootstrap_interval_of_a_normal_sample_is_the_textbook_one():
    x = np.random.default_rng(3).normal(5.0, 2.0, 400)
    half = 1.96 * x.std() / 20                                          # normal theory: mean ± 1.96 s / sqrt(n)
    lo, hi = bootstrap_ci(x)
    assert lo == pytest.approx(x.mean() - half, abs=0.05 * half)
    assert hi == pytest.approx(x.mean() + half, abs=0.05 * half)


def test_bootstrap_interval_of_small_samples_is_exact():
    assert bootstrap_ci([0.0, 1.0]) == [0.0, 1.0]                       # the mean is 0, 1/2, 1 with probability 1/4, 1/2, 1/4
    assert bootstrap_ci([7.0]) == [7.0, 7.0]
    # one 1 among four: P(mean = 0) = (3/4)^4 = 0.316 > 0.025; P(mean > 3/4) = 0.004 and P(mean >= 3/4) = 0.051, so the upper end is 3/4
    assert bootstrap_ci([1.0, 0.0, 0.0, 0.0]) == [0.0, 0.75]


def test_bootstrap_blocks_do_not_change_the_interval(monkeypatch):
    from modip_ray.tasks import scores
    x = np.random.default_rng(0).normal(size=50)
    whole = bootstrap_ci(x)
    monkeypatch.setattr(scores, "_BLOCK", 50 * 333)
    assert bootstrap_ci(x) == whole


def test_score_summary_is_the_documented_json():
    s = json.loads(json.dumps(score_summary({"return": np.float32([1000, 3000])}, "halfcheetah", seeds=np.arange(2))))
    assert set(s) == {"metric", "mean", "ci95", "episodes", "normalized", "values", "returns", "seeds", "also"}
    assert (s["metric"], s["mean"], s["ci95"], s["episodes"], s["seeds"], s["also"]) == ("return", 2000.0, [1000.0, 3000.0], 2, [0, 1], {})
    assert s["values"] == s["returns"] == [1000.0, 3000.0]
    assert s["normalized"] == pytest.approx(100 * 2280.178953 / 12415.178953)
    assert score_summary({"return": [1.0]})["normalized"] is None


def test_headline_and_other_measures():
    s = score_summary(measure("subtasks", [rewarded(0, 1, 0, 1), rewarded(1, 1, 1, 1)]), "kitchen")
    assert (s["metric"], s["mean"], s["values"], s["returns"], s["normalized"]) == ("subtasks/4", 0.75, [0.5, 1.0], [2.0, 4.0], 75.0)
    assert {name: m["mean"] for name, m in s["also"].items()} == {"all four": 0.5, "return": 3.0}
    assert s["also"]["all four"]["ci95"] == [0.0, 1.0]


def rewarded(*rewards):
    n = len(rewards)
    return Episode(np.zeros((n + 1, 1), np.float32), np.zeros((n, 1), np.float32), np.float32(rewards), False)


def test_success_is_ever_solved_not_the_sum():
    assert measure("success", [rewarded(0, 1, 1), rewarded(0, 0, 0), rewarded(1, 0, 0)]) == {"success": [1.0, 0.0, 1.0], "return": [2.0, 0.0, 1.0]}
    assert measure("return", [rewarded(0.5, -2)]) == {"return": [-1.5]}


@pytest.mark.parametrize(("call", "words"), [
    (lambda: score_summary({"return": []}), "non-empty"), (lambda: score_summary({"return": [1.0, float("nan")]}), r"return\[1\] is not finite"),
    (lambda: score_summary({"return": [1.0, 2.0]}, seeds=[1]), "2 episodes but 1 seeds"), (lambda: paired_difference([1.0], [1.0, 2.0]), "same seeds"),
])
def test_bad_scores_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_paired_difference_cancels_the_seeds_spread():
    spread = np.random.default_rng(0).normal(0, 1000, 30)
    d = paired_difference(spread + 10, spread)
    assert d["mean"] == pytest.approx(10)
    assert d["ci95"] == pytest.approx([10, 10])
