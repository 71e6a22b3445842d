import math

import pytest
import torch

from modip_ray.planning.mppi import elite_statistics, mppi, with_start

TARGET = torch.tensor([[0.5, -0.3], [0.1, 0.7], [-0.6, 0.0]])       # (H, Da)


def quadratic(actions):
    """(B, N, H, Da) -> (B, N), best at TARGET; row b is scaled by 100^b, so that scores of very different size meet in one call."""
    return -(actions - TARGET).square().sum((-1, -2)) * 100.0 ** torch.arange(len(actions))[:, None]


def run(proposals, warm=None, has_warm=None, box=1.0, seed=0, **settings):
    b, _, h, da = proposals.shape
    generator = torch.Generator().manual_seed(seed)
    settings = {"iterations": 20, "n_gaussian": 128, "n_elites": 16, "temperature": 1.0, "std_min": 0.05, "std_max": torch.tensor(0.5), **settings}
    noise = torch.randn(b, settings.pop("iterations"), settings.pop("n_gaussian"), h, da, generator=generator)
    low, high = torch.full((b, h, da), -box), torch.full((b, h, da), box)
    kept = with_start(proposals, torch.zeros(b, h, da) if warm is None else warm, torch.zeros(b, dtype=torch.bool) if has_warm is None else has_warm, low, high)
    return mppi(quadratic, kept, quadratic(kept), noise, low=low, high=high, **settings)


def error(result):
    return (result.mean - TARGET).abs().amax((1, 2))                # (B,)


def test_elite_statistics_by_hand():
    candidates = torch.tensor([0.0, 1.0, 2.0, 5.0]).view(1, 4, 1, 1)
    scores = torch.tensor([[-9.0, 3.0, 1.0, 2.0]])                  # elites of 3: candidates 1, 5, 2 with scores 3, 2, 1, whose std is 1
    mean, std, elites, weights = elite_statistics(candidates, scores, 3, 2.0, 0.0, torch.tensor(10.0))
    w = [1.0, math.exp(-2), math.exp(-4)]
    w = [x / sum(w) for x in w]
    m = w[0] * 1 + w[1] * 5 + w[2] * 2
    assert elites.flatten().tolist() == [1.0, 5.0, 2.0]
    torch.testing.assert_close(weights, torch.tensor([w]))
    assert mean.item() == pytest.approx(m, rel=1e-5)
    assert std.item() == pytest.approx(math.sqrt(w[0] * (1 - m) ** 2 + w[1] * (5 - m) ** 2 + w[2] * (2 - m) ** 2), rel=1e-5)


def test_weights_do_not_depend_on_the_scale_or_offset_of_scores():
    candidates, scores = torch.randn(2, 20, 3, 2), torch.randn(2, 20)
    one = elite_statistics(candidates, scores, 5, 1.0, 0.0, torch.tensor(1.0))
    other = elite_statistics(candidates, 1000 * scores + 5, 5, 1.0, 0.0, torch.tensor(1.0))
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(one[3].sum(1), torch.ones(2))
    assert (one[3] > 0).all() and (one[3].diff(dim=1) <= 0).all()   # best first


def test_one_elite_and_equal_scores():
    candidates = torch.tensor([0.0, 4.0]).view(1, 2, 1, 1)
    mean, std, _, weights = elite_statistics(candidates, torch.tensor([[1.0, 2.0]]), 1, 1.0, 0.05, torch.tensor(1.0))
    assert (mean.item(), weights.item()) == (4.0, 1.0) and std.item() == pytest.approx(0.05)
    mean, _, _, weights = elite_statistics(candidates, torch.ones(1, 2), 2, 1.0, 0.05, torch.tensor(9.0))
    assert weights.tolist() == [[0.5, 0.5]] and mean.item() == 2.0


def test_std_clamps():
    candidates = torch.tensor([[-1.0, 1.0], [0.0, 0.0]]).view(2, 2, 1, 1)               # row 0 spread 1, row 1 spread 0
    _, std, _, _ = elite_statistics(candidates, torch.zeros(2, 2), 2, 1.0, 0.1, torch.tensor([0.3, 0.4]))
    torch.testing.assert_close(std.flatten(), torch.tensor([0.3, 0.1]))
    for iterations in (0, 1, 5):
        result = run(torch.zeros(2, 4, 3, 2), iterations=iterations, std_min=0.07, std_max=torch.tensor(0.09))
        assert result.std.min() >= 0.07 - 1e-6 and result.std.max() <= 0.09 + 1e-6


def test_finds_the_optimum_of_a_quadratic():
    result = run(0.3 * torch.randn(3, 8, 3, 2, generator=torch.Generator().manual_seed(1)))
    assert (error(result) < 0.03).all(), error(result)
    torch.testing.assert_close(result.weights.sum(1), torch.ones(3))
    assert result.elites.shape == (3, 16, 3, 2)
    torch.testing.assert_close(result.mean, (result.weights[:, :, None, None] * result.elites).sum(1))


def test_each_iteration_helps():
    proposals = torch.zeros(1, 8, 3, 2)
    errors = [sum(error(run(proposals, iterations=i, seed=s, std_min=0.1)).item() for s in range(5)) for i in (0, 1, 3, 8)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.15 * errors[0]


def test_a_warm_start_helps_and_only_where_it_is_valid():
    proposals = torch.zeros(2, 8, 3, 2)
    warm = TARGET.expand(2, 3, 2)
    result = run(proposals, warm, torch.tensor([True, False]), iterations=1)
    cold = run(proposals, iterations=1)
    assert error(result)[0] < 0.5 * error(cold)[0]
    torch.testing.assert_close(result.mean[1], cold.mean[1])


def test_a_wide_first_round_is_drawn_around_the_last_plan_or_nil_with_the_largest_std():
    proposals, warm = torch.full((2, 8, 3, 2), 0.9), torch.full((2, 3, 2), -0.4)
    noise, seen = torch.randn(2, 2, 64, 3, 2, generator=torch.Generator().manual_seed(0)), []

    def score(actions):
        seen.append(actions)
        return quadratic(actions)

    def search(wide):
        seen.clear()
        kept = with_start(proposals, warm, torch.tensor([True, False]), low := -torch.ones(2, 3, 2), high := torch.ones(2, 3, 2), wide)
        seen.append(kept)
        return mppi(score, kept, quadratic(kept), noise, low=low, high=high, n_elites=8, temperature=1.0, std_min=0.01, std_max=torch.tensor(0.5), wide=wide)
    found = search(True)
    start = torch.stack([warm[0], torch.zeros(3, 2)])[:, None]
    torch.testing.assert_close(seen[0], torch.cat([proposals, start], 1))                             # it is a candidate itself
    torch.testing.assert_close(seen[1], (start + 0.5 * noise[:, 0]).clamp(-1, 1))
    assert not torch.allclose(seen[2], (start + 0.5 * noise[:, 1]).clamp(-1, 1), atol=0.05)           # the second round is around the elites
    assert (error(found)[1] < error(search(False))[1] - 0.1).all()  # equal proposals, far away, have no spread to search with


def test_without_gaussians_it_chooses_among_the_proposals():
    proposals = torch.stack([torch.zeros(3, 2), TARGET, -TARGET])[None]
    result = run(proposals, n_gaussian=0, n_elites=1)
    torch.testing.assert_close(result.mean[0], TARGET)
    only_few = run(proposals, iterations=0, n_elites=50)            # more elites than candidates: all of them (and the start point)
    assert only_few.elites.shape == (1, 4, 3, 2)


def test_nothing_leaves_the_trust_region():
    proposals = 0.05 * torch.randn(2, 8, 3, 2, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
    result = run(proposals, warm=torch.full((2, 3, 2), 0.9), has_warm=torch.ones(2, dtype=torch.bool), box=0.2)
    assert result.elites.abs().max() <= 0.2 and result.mean.abs().max() <= 0.2 + 1e-6      # a weighted mean rounds
    expected = TARGET.clamp(-0.2, 0.2)                              # the best that the box allows
    torch.testing.assert_close(result.mean, expected.expand(2, 3, 2), atol=0.04, rtol=0)
    far = run(proposals, box=1.0)
    assert far.mean.abs().max() > 0.4                               # the box is what held it back


def test_what_is_kept_is_scored_once():
    calls = []

    def score(actions):
        calls.append(actions.shape[1])
        return quadratic(actions)

    kept = torch.zeros(1, 9, 3, 2)
    box = torch.ones(1, 3, 2)
    mppi(score, kept, quadratic(kept), torch.randn(1, 3, 20, 3, 2), low=-box, high=box, n_elites=4, temperature=1.0, std_min=0.05, std_max=torch.tensor(0.5))
    assert calls == [20, 20, 20]


def test_rows_do_not_mix():
    proposals = 0.3 * torch.randn(3, 8, 3, 2, generator=torch.Generator().manual_seed(1))
    changed = proposals.clone()
    changed[0] = 0.9
    torch.testing.assert_close(run(proposals).mean[1:], run(changed).mean[1:])
