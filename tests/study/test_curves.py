import numpy as np
import pytest

from modip_ray.config import load
from modip_ray.study.curves import Drawn, draw, due, over_seeds


def test_a_curve_has_the_points_where_every_seed_was_evaluated():
    steps, score, band = over_seeds([{0: (0, 10.0), 20: (21, 30.0), 40: (40, 50.0), 50: (50, 60.0)}, {0: (0, 20.0), 20: (23, 20.0), 50: (50, 20.0)}])
    np.testing.assert_allclose(steps, [0, 22, 50])
    np.testing.assert_allclose(score, [15, 25, 40])
    np.testing.assert_allclose(band, [[10, 20], [20, 30], [20, 60]])


def test_seeds_without_a_point_in_common_have_no_curve():
    steps, score, band = over_seeds([{0: (0, 10.0)}, {20: (23, 20.0)}])
    assert len(steps) == len(score) == len(band) == 0


@pytest.mark.parametrize("every, at", [(20_000, {0: 0, 20_195: 20_000, 45_008: 40_000, 50_003: 50_000}), (0, {0: 0, 50_000: 50_000})])
def test_evaluations_belong_to_the_step_that_they_were_due_at(every, at):
    cfg = load(overrides=["online.env_steps=50000", f"eval.every_steps={every}"])
    assert {step: due(step, cfg) for step in at} == at


def test_time_is_drawn_of_what_has_finished_and_the_metric_is_named():
    curve = {0: (0, 1.0), 30: (30, 2.0)}
    drawn = {("a", "mpc"): Drawn([curve], 2.0, "success"), ("a", "policy"): Drawn([curve, curve], None, "success")}
    left, right = draw("lift", ["a"], drawn).axes
    assert left.get_ylabel() == "success" and len(left.lines) == 2 and [line.get_xdata().tolist() for line in right.lines] == [[0.0, 1.0]]


def test_every_method_has_a_line_of_the_legend_and_a_colour_of_its_own():
    methods = [f"method_{i}" for i in range(12)]
    drawn = {(m, mode): Drawn([{0: (0, 1.0), 30: (30, 2.0)}], 1.0, "return") for m in methods for mode in ("mpc", "policy")}
    figure = draw("hopper", methods, drawn)
    handles = figure.legends[0].legend_handles
    assert [handle.get_label() for handle in handles] == ["MPC-acting", "DP-only", *methods]
    assert len({handle.get_color() for handle in handles[2:]}) == 12
    assert [handle.get_color() for handle in handles[2:]] == [line.get_color() for line in figure.axes[0].lines[::2]]
    figure.draw_without_rendering()
    assert figure.legends[0].get_window_extent().height <= figure.bbox.height, "all of it is seen"
