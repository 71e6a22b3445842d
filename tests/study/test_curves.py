import numpy as np

from modip_ray.study.curves import over_seeds


def test_seeds_that_were_evaluated_at_other_steps_meet_where_the_least_often_evaluated_was():
    often = {0: (1.0, 10.0), 20: (3.0, 30.0), 40: (5.0, 50.0), 50: (6.0, 60.0)}
    seldom = {0: (3.0, 20.0), 30: (6.0, 20.0), 51: (9.0, 20.0)}
    steps, wall, score, band = over_seeds([often, seldom])
    np.testing.assert_allclose(steps, [0, 30, 51])
    np.testing.assert_allclose(wall, [2, 5, 7.5])                   # beyond a seed's last evaluation, by little, that one counts
    np.testing.assert_allclose(score, [15, 30, 40])
    np.testing.assert_allclose(band, [[10, 20], [20, 40], [20, 60]])


def test_a_curve_ends_where_the_seed_that_is_behind_does():
    steps, _, score, _ = over_seeds([{0: (0.0, 1.0), 20: (1.0, 3.0)}, {0: (0.0, 1.0), 19: (1.0, 1.0), 40: (2.0, 9.0)}])
    np.testing.assert_allclose(steps, [0, 20])
    assert score[0] == 1 and 2 < score[1] < 2.5
