import io

import pytest

from modip_ray.report import Progress, final_table
from modip_ray.report.progress import PLAIN_INTERVAL_S


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def progress(stream):
    clock = Clock()
    return Progress(stream, clock=clock), clock


def test_not_a_terminal_gets_a_line_every_ten_seconds_at_most():
    stream = io.StringIO()
    bar, clock = progress(stream)
    bar.start("online", 1000, "steps")
    for second in range(1, 31):
        clock.now = float(second)
        bar.update(second * 10)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 1 + 30 // PLAIN_INTERVAL_S
    assert lines[0] == "online: 0/1,000 steps  0%"
    assert lines[-1] == "online: 300/1,000 steps  30%  10.0/s  1:10 left"
    assert "\r" not in stream.getvalue()


def test_a_terminal_line_is_rewritten_five_times_a_second_at_most(monkeypatch):
    monkeypatch.setenv("COLUMNS", "50")
    stream = Terminal()
    bar, clock = progress(stream)
    bar.start("pretrain", 100, "updates")
    for tick in range(1, 101):
        clock.now = tick / 100
        bar.update(tick, loss="x" * 100)
    writes = stream.getvalue().split("\r")[1:]
    assert 5 <= len(writes) <= 7 and "\n" not in stream.getvalue()
    assert all(len(text.removesuffix("\x1b[K")) <= 49 for text in writes)
    bar.finish("done")
    assert stream.getvalue().endswith("\n") and "pretrain: 100 updates in 0:01" in stream.getvalue()


def test_rate_follows_the_last_half_minute():
    bar, clock = progress(io.StringIO())
    bar.start("online", 10_000, "steps")
    done = 0
    for second in range(1, 301):
        clock.now = float(second)
        done += 100 if second <= 100 else 2  # slows down
        bar.update(done)
    assert bar.rate() == pytest.approx(2.0)
    assert bar.seconds_left() == pytest.approx(0.0)  # more than total was made
    bar.start("online", 10_000, "steps")
    assert bar.rate() is None and bar.seconds_left() is None


def test_resumed_steps_do_not_count_for_the_rate():
    stream = io.StringIO()
    bar, clock = progress(stream)
    bar.start("online", 2000, "steps", done=1000)
    clock.now = 10.0
    bar.update(1100)
    assert bar.rate() == pytest.approx(10.0) and bar.seconds_left() == pytest.approx(90.0)
    bar.finish()
    assert "1,100 steps in 0:10 (10.0 steps/s)" in stream.getvalue()


def test_extras_end_with_the_phase_and_scores_stay():
    bar, clock = progress(io.StringIO())
    bar.start("pretrain", 10, "updates")
    bar.scores(bc=4744.2)
    bar.update(5, loss=0.5)
    assert "loss 0.500" in bar.line() and bar.line().endswith("bc 4,744")
    bar.start("online", 10, "steps")
    assert "loss" not in bar.line() and bar.line().endswith("bc 4,744")


def test_many_updates_keep_the_window_small():
    bar, clock = progress(io.StringIO())
    bar.start("online", 10**6, "steps")
    for tick in range(50_000):
        clock.now = tick * 1e-3
        bar.update(tick)
    assert len(bar._points) <= 2001 and bar.rate() == pytest.approx(1000, rel=0.05)


def test_say_keeps_the_live_line_below(monkeypatch):
    stream = Terminal()
    bar, _ = progress(stream)
    bar.start("online", 10, "steps")
    bar.say("worker 3 restarted")
    assert "\r\x1b[Kworker 3 restarted\n\ronline: 0/10" in stream.getvalue()


def test_update_before_start_is_refused():
    with pytest.raises(RuntimeError, match="before Progress.start"):
        Progress(io.StringIO()).update(3)


def summary(task="hopper-medium", env_id="Hopper-v4", **scores):
    return {"task": task, "env_id": env_id, "scores": scores, "phase_s": {"data": 41.0, "online": 3700.0}, "wall_s": 3800.0}


def test_final_table_shows_ratio_interval_and_verdict():
    bc = {"mean": 1000.0, "ci95": [950.0, 1050.0], "episodes": 20, "normalized": 31.4}
    mpc = {"mean": 1250.0, "ci95": [1100.0, 1400.0], "episodes": 20, "normalized": 39.0}
    worse = {"mean": 800.0, "ci95": [700.0, 900.0], "episodes": 20, "normalized": None}
    text = final_table(summary(bc=bc, mpc=mpc, policy=worse))
    lines = {line.split()[0]: line for line in text.splitlines() if line}
    assert "1.25" in lines["MPC"] and "1,100 .. 1,400" in lines["MPC"] and lines["MPC"].endswith("above BC, intervals apart")
    assert "0.80" in lines["DP-only"] and lines["DP-only"].endswith("below BC, intervals apart")
    assert "3050 ± 90" in lines["BC"] and "3281 ± 370" in lines["MPC"]
    assert "TD-MPC2 2129" in text and "1e6" in text
    assert "data 0:41, online 1:01:40, total 1:03:20" in text


def test_final_table_of_an_unpublished_task_has_no_paper_column():
    text = final_table(summary("reacher", "Reacher-v4", bc={"mean": -5.0, "ci95": [-6.0, -4.0], "episodes": 3}, mpc={"mean": -4.0, "ci95": None}))
    assert "paper" not in text and "x BC" in text
    assert text.splitlines()[3].split()[:3] == ["MPC", "-4.000", "-"]  # a ratio of negative scores would mislead


def test_final_table_without_scores():
    assert final_table({"task": "hopper-medium"}) == "hopper-medium: no scores yet"
