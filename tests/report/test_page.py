import errno
import os
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest

from modip_ray.cli import main
from modip_ray.report import MetricsLog, plots, svg
from modip_ray.report.page import write_report
from modip_ray.report.plots import ratio_to_bc
from modip_ray.report.published import published_for
from modip_ray.report.rundata import flatten, load_run, role_times
from modip_ray.report.scores import final_table, method_of, score_cells, verdict
from modip_ray.study.spec import load_study

TITLES = ["Scores", "Learning curves", "Video", "World-model error by horizon", "Value calibration"]
TITLES += ["Planner and distillation", "Losses", "System", "Where the time went", "Configuration and versions"]
VOID = {"meta", "br", "link", "img", "input", "hr"}


class Checker(HTMLParser):
    """Balanced tags, unique ids, every address."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.addresses = [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        for key, value in attrs:
            if key == "id":
                self.ids.append(value)
            if key in ("href", "src"):
                self.addresses.append(value)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"unbalanced </{tag}>"


def checked(path):
    page = path.read_text()
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert len(checker.ids) == len(set(checker.ids))
    assert not re.search(r"https?://|@import|<script|<link", page)
    references = set(re.findall(r"url\(#([^)]+)\)", page)) | {a[1:] for a in checker.addresses if a.startswith("#")}
    assert references <= set(checker.ids)
    return page, checker


def test_a_page_that_cannot_be_written_is_said(make_run, monkeypatch, capsys):
    run = make_run()
    monkeypatch.setattr("os.replace", refuse(errno.EROFS))
    for words in ("cannot be written (Read-only file system); make room or give access, and give the same command again", "report is no folder; give access"):
        with pytest.raises(SystemExit, match="2"):
            main(["report", str(run)])
        assert words in capsys.readouterr().err
        shutil.rmtree(run / "report", ignore_errors=True)
        (run / "report").write_text("in the way")


def refuse(number):
    def fails(*args):
        raise OSError(number, os.strerror(number))
    return fails


def test_finished_run_has_every_section_and_no_outside_address(make_run):
    path = write_report(make_run())
    assert path.name == "index.html" and path.parent.name == "report" and [p.name for p in path.parent.iterdir()] == ["index.html"]
    page, _ = checked(path)
    assert re.findall(r"<h2>(.*?)</h2>", page) == TITLES
    assert page.count('class="missing"') == 1 and "report/video.mp4 is absent" in page
    assert "prefers-color-scheme: dark" in page and 'name="viewport"' in page
    assert "13775 ± 203" in page and "1.40 x BC, intervals apart" in page and "planning.guard" in page
    assert "finished</span>" in page and "unfinished" not in page
    assert path.stat().st_size < 1_000_000


def test_charts_use_only_theme_colors(make_run):
    page, _ = checked(write_report(make_run()))
    charts = "".join(re.findall(r"<svg.*?</svg>", page, flags=re.S))
    assert charts.count("<svg") == 31 and not re.findall(r"(?:fill|stroke): (?!none|var)[^;\"]*", charts)
    used = set(re.findall(r"var\(--(\w+)\)", page))
    assert used <= set(re.findall(r"--(\w+):", page)) | {"c"}


def test_unfinished_run_shows_the_latest_evaluations(make_run):
    page, _ = checked(write_report([make_run(finished=False)]))
    assert "unfinished</span>" in page and "No summary.json" in page and "HalfCheetah-v4" in page
    assert "20,000 environment steps" in page and "latest evaluations" in page


def test_a_run_with_one_row_says_why_each_section_is_empty(tmp_path):
    with MetricsLog(tmp_path / "young", tensorboard=False) as log:
        log.write({"kind": "train", "phase": "pretrain", "env_steps": 0, "updates": 1})
    page, _ = checked(write_report(tmp_path / "young"))
    assert re.findall(r"<h2>(.*?)</h2>", page) == TITLES and page.count('class="missing"') >= len(TITLES)


def test_nulls_and_absent_keys_are_survived(tmp_path):
    with MetricsLog(tmp_path, tensorboard=False) as log:
        log.write({"kind": "data", "mean": None, "ci95": [None, None], "source": "<b>x</b>"})
        log.write({"kind": "eval", "mode": "mpc", "env_steps": 5, "mean": 1.0, "ci95": [None, None]})
        log.write({"kind": "eval", "mode": "bc", "env_steps": 0, "mean": 0.0, "ci95": [0.0, 0.0], "episodes": 3})
        log.write(
            {"kind": "diagnostics", "phase": "online", "env_steps": 5, "latent_r2": [0.9, np.nan, -40.0], "value_pred": [1.0, None], "value_return": [2.0, 1.0]}
        )
        log.write({"kind": "train", "phase": "online", "env_steps": 1, "updates": 1, "loss/value": np.nan})
        log.write({"kind": "train", "phase": "online", "env_steps": 2, "updates": 2, "loss/value": 0.0})
        log.write({"kind": "timing", "role": "learner", "seconds": {}, "counts": {}})
    page, _ = checked(write_report(tmp_path))
    assert "<b>x</b>" not in page and "&lt;b&gt;x" in page and "Correlation unknown" in page


def test_small_video_is_embedded_and_a_large_one_linked(make_run):
    run, other = make_run("a"), make_run("b")
    for folder, size in ((run, 1000), (other, 5 * 2**20)):
        (folder / "report").mkdir()
        (folder / "report" / "video.mp4").write_bytes(b"\0" * size)
    page, checker = checked(write_report([run, other]))
    assert [a[:22] for a in checker.addresses if a.startswith("data:")] == ["data:video/mp4;base64,"]
    assert checker.addresses.count("../../b/report/video.mp4") == 2  # player and link, relative to the page of the first run
    assert "Comparison" in page and page.count("<h2>Scores</h2>") == 2


def test_bad_inputs_are_named(tmp_path, make_run):
    with pytest.raises(ValueError, match="no run folder"):
        write_report([])
    with pytest.raises(FileNotFoundError, match="modip train"):
        write_report(tmp_path / "nothing")
    run = make_run()
    (run / "summary.json").write_text("{")
    with pytest.raises(ValueError, match="summary.json.*delete it"):
        write_report(run)


def test_curve_takes_the_later_of_two_evaluations_at_one_step():
    rows = [{"kind": "eval", "mode": "mpc", "env_steps": s, "mean": m, "ci95": [m - 1, m + 1]} for s, m in ((10, 1.0), (0, 5.0), (10, 2.0))]
    steps, means, bands = plots.curve(rows, "mpc")
    assert steps.tolist() == [0, 10] and means.tolist() == [5.0, 2.0] and bands.tolist() == [[4.0, 6.0], [1.0, 3.0]]
    assert plots.curve(rows, "policy")[2].shape == (0, 2)


def test_horizon_snapshots_keep_pretraining_first_and_last():
    rows = [{"kind": "diagnostics", "phase": "pretrain", "env_steps": 0, "latent_r2": [1]}]
    rows += [{"kind": "diagnostics", "phase": "online", "env_steps": s, "latent_r2": [1]} for s in range(0, 21)]
    snapshots = plots.horizon_snapshots(rows, "latent_r2")
    assert [s["env_steps"] for s in snapshots[1:]] == [0, 5, 10, 15, 20] and snapshots[0]["phase"] == "pretrain"
    assert [color for _, color, _ in plots.horizon_legend(snapshots)] == ["pre", "seq1", "seq2", "seq3", "seq4", "seq5"]
    assert [color for _, color, _ in plots.horizon_legend(snapshots[:2])] == ["pre", "seq5"]


def test_thin_averages_and_drops_gaps():
    x, y = svg.thin([0, 1, 2, 3, 4], [0.0, 2.0, float("nan"), 6.0, 8.0], points=2)
    assert x.tolist() == [0.5, 3.5] and y.tolist() == [1.0, 7.0]


def test_tick_labels_have_one_unit_an_axis():
    assert [svg.short_number(v, 40_000) for v in (0, 5000, 40_000)] == ["0", "5k", "40k"]
    assert [svg.short_number(v, 7000) for v in (0, -500, 7000)] == ["0", "\u2212500", "7,000"]
    assert svg.short_number(1.5e6, 2e6) == "1.5M" and svg.short_number(0.05, 1.0) == "0.05"


def test_role_times_add_up_over_restarts_and_workers():
    rows = [
        {"kind": "timing", "role": "learner", "wall_s": 10.0, "seconds": {"update": 4.0}, "counts": {"update": 4}},
        {"kind": "timing", "role": "learner", "wall_s": 20.0, "seconds": {"update": 9.0}, "counts": {"update": 9}},
        {"kind": "timing", "role": "learner", "wall_s": 30.0, "seconds": {"update": 5.0}, "counts": {"update": 5}},  # a new process
        {"kind": "timing", "role": "rollout", "wall_s": 30.0, "workers": 4, "seconds": {"env": 60.0, "env/step": 50.0}, "counts": {"env": 1}},
    ]
    learner, rollout = role_times(rows)
    more = {"kind": "timing", "role": "learner", "wall_s": 50.0, "seconds": {"update": 8.0}, "counts": {"update": 8}}
    assert role_times([*rows, more])[0].snapshot["counts"] == {"update": 17}, "the same process"
    assert role_times([*rows, {"kind": "resume"}, more])[0].snapshot["counts"] == {"update": 22}, "one that did more until its first row than the one before"
    fewer = [{"kind": "timing", "role": "rollout", "wall_s": 100.0, "workers": 1, "seconds": {"env": 100.0}, "counts": {"env": 9}}, {"kind": "resume"},
             {"kind": "timing", "role": "rollout", "wall_s": 200.0, "workers": 4, "seconds": {"env": 400.0}, "counts": {"env": 9}}]
    assert role_times(fewer)[0].total == 500.0, "each process's time times its workers"
    assert learner.snapshot == {"seconds": {"update": 14.0}, "counts": {"update": 14}} and learner.total == 30.0
    assert rollout.total == 120.0 and rollout.workers == 4


def test_published_rows_are_found_by_task_or_environment():
    assert published_for("hopper-medium").modip == "3281 ± 370"
    assert published_for("", "Walker2d-v4").bc == "5721 ± 324"
    assert published_for("kitchen-complete-v0").bc == "0.41 ± 0.20"
    assert published_for("kitchen-mixed") is None and published_for("Reacher-v4") is None and published_for("scan") is None


def test_run_data_prefers_the_summary_and_flattens_the_config(make_run):
    run = load_run(make_run())
    assert run.scores["mpc"]["episodes"] == 20 and run.scores["data"]["episodes"] == 100
    assert run.config["model.latent_dim"] == 128 and run.config["model.hidden"] == [256, 256]
    assert flatten({"a": {"b": {"c": 1}}, "d": {}}) == {"a.b.c": 1, "d": {}}


def test_the_summary_of_a_run_that_is_prolonged_is_not_its_own(make_run):
    folder = make_run()
    assert load_run(folder).finished
    with open(folder / "config.yaml", "a") as config:
        config.write("\nonline: {env_steps: 1000000000}\n")
    longer = load_run(folder)
    assert not longer.finished and longer.scores["mpc"]["episodes"] != 20, "the latest periodic one"


def test_a_rivals_page_has_its_name_and_its_own_published_score():
    rival = {"scores": {"bc": {"mean": 80.0, "episodes": 50}, "policy": {"mean": 500.0, "episodes": 50}, "mpc": {"mean": 300.0, "episodes": 50}}}
    assert [cell["paper"] for cell in score_cells(rival["scores"], "hopper-medium", "Hopper-v4", "TD-MPC2")] == ["3050 \u00b1 90", "", "2129"]
    del rival["scores"]["mpc"]
    assert [cell["paper"] for cell in score_cells(rival["scores"], "hopper-medium", "Hopper-v4", "DPPO")] == ["3050 \u00b1 90", "1612"]
    assert "13775" not in final_table({**rival, "task": "halfcheetah-medium", "env_id": "HalfCheetah-v4", "algorithm": "PA-RL"}).split("others in the paper")[0]


@pytest.mark.parametrize("method, name", [("modip", "MODIP"), ("tdmpc2", "TD-MPC2"), ("dppo", "DPPO"), ("parl", "PA-RL"), ("dql", "DQL"), ("dsrl", "DSRL")])
def test_methods_of_the_rivals_study_have_their_names(method, name):
    cell = next(c for c in load_study("rivals").cells() if c.method == method)
    assert method_of(flatten(cell.cfg.to_dict())) == name


def test_few_episodes_give_no_verdict_and_one_no_interval():
    def scores(n):
        return {"bc": {"mean": 1.0, "ci95": [0.9, 1.1], "episodes": n}, "mpc": {"mean": 3.0, "ci95": [2.9, 3.1], "episodes": n}}
    assert verdict(scores(10), "mpc") == "above BC, intervals apart" and verdict(scores(9), "mpc") == ""
    assert [cell["ci95"] for cell in score_cells(scores(1), "x", "y")] == ["-", "-"]


def test_a_score_far_beyond_bc_does_not_push_the_others_together():
    def scores(mpc):
        return {"bc": {"mean": 1.0, "ci95": [0.9, 1.1]}, "mpc": {"mean": mpc, "ci95": [0.9 * mpc, 1.1 * mpc]}}
    drawn = ratio_to_bc.__wrapped__([("near", scores(1.5)), ("far", scores(18.9))]).axes[0]
    assert drawn.get_xlim()[1] < 5 and [note.get_text() for note in drawn.texts] == ["18.9"]
