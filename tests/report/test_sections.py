"""What the page says of plans and of the system, and of several runs side by side."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from modip_ray.report import MetricsLog
from modip_ray.report.compare import comparison, look, names_of, settings
from modip_ray.report.page import write_report
from modip_ray.report.plan_sections import MEASURED, decisions_of, measured, planner, realised_gain, returns_of_plans
from modip_ray.report.rundata import RoleTime, load_run
from modip_ray.report.svg import RUNS
from modip_ray.report.system_sections import gauges, over_processes, speed, system, utilisation


def test_plans_are_shown_at_the_start_and_the_end(make_run):
    page = planner(load_run(make_run()))
    assert re.findall("<h3>(.*?)</h3>", page) == ["Plans after pre-training", "Plans after 40,000 online steps"]
    assert page.count("Correlation 0.95; predictions are 9.000 too high on average; 128 decisions, 96 acted on a plan.") == 2
    assert page.count("<svg") == 2 + 1 + len(MEASURED) and 'class="missing"' not in page


def test_a_run_of_an_earlier_version_says_what_was_not_recorded(tmp_path):
    with MetricsLog(tmp_path, tensorboard=False) as log:
        log.write({"kind": "diagnostics", "phase": "online", "env_steps": 5, "plan_gain_mean": 1.0, "plan_share_distilled": 0.5})
        log.write({"kind": "system", "phase": "online", "env_steps": 5, "updates": 1})
    run = load_run(tmp_path)
    page = planner(run)
    assert "runs of earlier versions have none" in page and page.count("<svg") == 2
    assert system(run).count('class="missing"') == 3 and "<svg" not in system(run)


def test_the_realised_gain_pairs_the_seeds_that_both_ran():
    def row(mode, step, values, seeds):
        return {"kind": "eval", "mode": mode, "env_steps": step, "values": values, "seeds": seeds}
    rows = [row("policy", 0, [1.0, 2.0, 50.0], [7, 8, 9]), row("mpc", 0, [5.0, 4.0], [8, 7]), row("mpc", 10, [1.0], [7])]
    gain = realised_gain(rows)
    assert gain.x == [0] and gain.y == [3.0] and gain.band.tolist() == [[3.0, 3.0]]          # 4 - 1 and 5 - 2
    assert realised_gain(rows[2:]) is None and realised_gain([{"kind": "eval", "mode": "mpc", "mean": 1.0}]) is None


def test_measured_takes_the_later_of_two_and_leaves_gaps_out():
    rows = [{"env_steps": 5, "k": 1.0}, {"env_steps": 0, "k": 3.0}, {"env_steps": 5, "k": 2.0}, {"env_steps": 9, "k": None}, {"env_steps": 7}]
    assert measured(rows, "k") == ([0, 5], [3.0, 2.0])


def test_the_system_section_counts_restarts_and_says_what_happened(make_run):
    page = system(load_run(make_run()))
    assert "Counts of the whole run; resumed 0 times, 1 incident." in page
    assert "<code>planner/restarts</code></td><td>1</td><td>restarts of the planners<" in page
    assert "9:15 the planner died &amp; came back" in page and "learner_model/restarts" not in page
    assert "rollout: share of time waiting" in page and "memory by role, MB" in page and 'class="missing"' not in page


def test_restarts_after_the_last_checkpoint_before_a_kill_are_counted(make_run):
    """And those of two processes add up also where the second one has more of them at its first row."""
    folder = make_run(finished=False)
    with MetricsLog(folder, tensorboard=False) as log:
        log.write({"kind": "system", "phase": "online", "env_steps": 10**6, "updates": 10**6, "planner/restarts": 3, "rollout/lost": 5})
    with MetricsLog(folder, tensorboard=False, resumed_at={"phase": "online", "env_steps": 10, "updates": 10}) as log:
        log.write({"kind": "system", "phase": "online", "env_steps": 20, "updates": 12, "planner/restarts": 4, "rollout/lost": 0})
    page = system(load_run(folder))
    assert "<code>planner/restarts</code></td><td>7</td>" in page and "<code>rollout/lost</code></td><td>5</td>" in page and "resumed 1 time," in page


def test_a_prediction_that_is_no_number_is_left_out_with_what_was_done():
    row = {"plan_pred": [1.0, None, 3.0], "plan_return": [1.0, 2.0, 4.0], "plan_acted": [1, 0, 0], "plan_gain_mean": 0.1, "env_steps": 0}
    assert decisions_of(row) == [(1.0, 1.0, True), (3.0, 4.0, False)]
    assert "2 decisions, 1 acted on a plan" in returns_of_plans([row])


def test_counts_that_begin_anew_with_a_process_add_up():
    assert over_processes([0, 1, 2, 0, 1, 1]) == 3.0 and over_processes([]) == 0.0 and over_processes([2, 2]) == 2.0


def test_speeds_leave_out_resumes():
    """After 20 s the process is killed at a step that no checkpoint has; what goes on does 20 a second, from its own first row on."""
    rows = [{"kind": "system", "wall_s": s, "env_steps": n} for s, n in ((0.0, 0), (10.0, 50), (30.0, 60), (40.0, 260))]
    rows.insert(2, {"kind": "resume", "wall_s": 20.0, "env_steps": 50})
    (line,) = speed(rows, "env_steps", "steps")
    assert list(line.y) == [5.0, 20.0] and list(line.x) == [5 / 60, 35 / 60]
    assert speed(rows[:2], "env_steps", "steps") == [] and gauges(rows, [("absent", "x")]) == []


def test_waits_that_overlap_do_not_fill_more_than_the_bar():
    roles = [RoleTime("replay", {"seconds": {"wait/a": 80.0, "wait/b": 70.0, "add": 10.0}, "counts": {}}, 160.0, 1),
             RoleTime("planner", {"seconds": {"plan": 30.0, "plan/search": 25.0, "wait/rows": 50.0}, "counts": {}}, 100.0, 1)]
    page = utilisation(roles)
    assert re.findall(r"width: ([\d.]+)%", page) == ["6.2", "93.8", "30.0", "50.0", "20.0"]
    assert "a 50 %, b 44 %" in page and "rows 50 %" in page


def run_at(path):
    return SimpleNamespace(path=Path(path))


def test_runs_are_named_by_what_tells_them_apart():
    assert names_of([run_at("/x/full"), run_at("/x/small")]) == ["full", "small"]
    assert names_of([run_at("/s/hopper/seed_0"), run_at("/s/walker/seed_0"), run_at("/s/walker/seed_1")]) == ["hopper/seed_0", "walker/seed_0", "walker/seed_1"]
    assert names_of([run_at("/x/full"), run_at("/x/full")]) == ["full", "full (2)"]
    assert len({look(i) for i in range(3 * len(RUNS))}) == 3 * len(RUNS)


@pytest.fixture
def pair(make_run):
    first, second = make_run("first"), make_run("second", finished=False, seed=1)
    config = second / "config.yaml"
    config.write_text(config.read_text().replace("iterations: 3", "iterations: 0").replace("seed: 0", "seed: 1"))
    return [load_run(first), load_run(second)]


def test_comparison_names_what_differs_and_overlays_all_runs(pair):
    page = comparison(pair)
    differing = page.partition("Settings that differ")[2].partition("</table>")[0]
    assert re.findall(r"<td><code>([^<]*)</code>", differing) == ["seed", "0", "1", "planning.iterations", "3", "0"]
    assert page.count("unfinished") == 1 and "<td>1.40</td>" in page
    labels = re.findall(r'aria-label="([^"]*)"', page)
    assert sum("first, second" in label for label in labels) == 3 + 1 + sum(len(keys) for *_, keys in MEASURED)
    assert 'class="missing"' not in page


def test_same_settings_and_runs_without_any_are_said_so(make_run, tmp_path):
    first = make_run("first")
    assert "the runs have the same settings" in settings([("a", load_run(first)), ("b", load_run(first))])
    with MetricsLog(tmp_path / "young", tensorboard=False) as log:
        log.write({"kind": "train", "phase": "pretrain", "env_steps": 0, "updates": 1})
    young = load_run(tmp_path / "young")
    assert "No config.yaml in young" in settings([("first", load_run(first)), ("young", young)])
    assert comparison([young, young]).count('class="missing"') == 4
    path = write_report([tmp_path / "young", tmp_path / "young"])
    assert [p.name for p in (tmp_path / "young" / "report").iterdir()] == ["comparison.html"], "the run's own page stays what it is"
    page = path.read_text()
    assert "<summary>All of young</summary>" in page and "<summary>All of young (2)</summary>" in page
