"""`modip status`: facts of runs in every state, and what a terminal shows of them. The end-to-end test is a real run, killed and gone on with."""

import fcntl
import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from modip_ray.cli.status import gather
from modip_ray.report import MetricsLog
from modip_ray.report.rundata import load_run
from modip_ray.report.status import Role, facts_of, roles_of, status_text
from modip_ray.runfolder import RunError, is_open
from tests.e2e.test_run import ENV, ROOT, command, modip, start_and_wait
from tests.fakes import small, write_data


def status(*args: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "modip_ray", "status", *args], cwd=ROOT, env=ENV | env, capture_output=True, text=True, timeout=120)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A run folder of 1,000 offline updates (half of each kind) and 1,000 steps, without rows."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(small(run, pretrain__updates=500, pretrain__policy_updates=500, online__env_steps=1000, serial=True).dump())
    return run


def write(folder: Path, *rows: dict, resumed_at: dict | None = None) -> None:
    with MetricsLog(folder, tensorboard=False, resumed_at=resumed_at) as log:
        for row in rows:
            log.write(row)


def row(kind: str, phase: str, wall_s: float, env_steps: int, updates: int = 500, policy_updates: int = 500, **more) -> dict:
    return {"kind": kind, "phase": phase, "wall_s": wall_s, "env_steps": env_steps, "updates": updates, "policy_updates": policy_updates, **more}


def evaluation(mode: str, env_steps: int, mean: float) -> dict:
    return {"kind": "eval", "mode": mode, "env_steps": env_steps, "updates": 500, "mean": mean, "ci95": [mean - 1, mean + 1], "episodes": 4, "metric": "return"}


def timing(role: str, wall_s: float, spans: dict[str, tuple[float, int]], workers: int = 1) -> dict:
    seconds, counts = {k: v[0] for k, v in spans.items()}, {k: v[1] for k, v in spans.items()}
    return {"kind": "timing", "role": role, "workers": workers, "wall_s": wall_s, "seconds": seconds, "counts": counts}


def test_rate_and_time_left_are_of_the_last_minute_of_the_phase(folder):
    write(folder, row("phase", "online", 100.0, 0), row("system", "online", 110.0, 10),
          row("system", "online", 150.0, 200), row("system", "online", 210.0, 500))
    p = facts_of(load_run(folder), running=True)["progress"]
    assert (p.done, p.total, p.unit, p.rate, p.left_s) == (500, 1000, "steps", 5.0, 100.0)
    stopped = facts_of(load_run(folder), running=False)
    assert stopped["progress"].rate is None and stopped["state"] == "stopped" and stopped["env_steps"] == 500


def test_the_phase_is_that_of_the_newest_process(folder):
    def phase():
        facts = facts_of(load_run(folder), running=True)
        return facts["phase"], facts["progress"] and (facts["progress"].done, facts["progress"].total)
    write(folder)
    assert phase() == ("data", None)
    write(folder, {"kind": "data", "mean": 3.0, "ci95": [2.0, 4.0], "episodes": 9})
    assert phase() == ("start", None)
    write(folder, row("phase", "pretrain", 1.0, 0, 0, 0), row("train", "pretrain", 2.0, 0, 300, 100))
    assert phase() == ("pretrain", (400, 1000))
    write(folder, row("phase", "online", 3.0, 0), row("system", "online", 4.0, 600))
    assert phase() == ("online", (600, 1000))
    write(folder, resumed_at={"phase": "pretrain", "env_steps": 0, "updates": 200})
    facts = facts_of(load_run(folder), running=True)
    assert (facts["phase"], facts["resumes"], facts["env_steps"]) == ("pretrain", 1, 0), "the online rows were lost"
    write(folder, row("phase", "evaluate", 9.0, 1000), row("system", "evaluate", 10.0, 1000, **{"eval/episodes": 6}))
    assert phase() == ("evaluate", (6, 12))


def test_a_summary_of_fewer_steps_than_asked_for_does_not_make_it_finished(folder):
    write(folder, row("phase", "evaluate", 1.0, 400), evaluation("mpc", 800, 7.0))
    summary = {"env_steps": 1000, "wall_s": 5.0, "scores": {"mpc": {"mean": 9.0, "ci95": [8.0, 10.0], "episodes": 4}}}
    (folder / "summary.json").write_text(json.dumps(summary))
    done = facts_of(load_run(folder), running=False)
    assert (done["state"], done["phase"], done["progress"], done["scores"]["mpc"]["mean"]) == ("finished", "finished", None, 9.0)
    (folder / "summary.json").write_text(json.dumps(summary | {"env_steps": 400}))
    more = facts_of(load_run(folder), running=False)
    assert (more["state"], more["phase"], more["scores"]["mpc"]["mean"]) == ("stopped", "evaluate", 7.0)


def test_the_policys_first_score_stands_for_bc_until_bc_is_measured(folder):
    write(folder, evaluation("policy", 0, 5.0), evaluation("policy", 300, 6.0), evaluation("mpc", 300, 8.0))
    scores = facts_of(load_run(folder), running=False)["scores"]
    assert {name: s["mean"] for name, s in scores.items()} == {"bc": 5.0, "policy": 6.0, "mpc": 8.0}
    write(folder, evaluation("bc", 1000, 5.5))
    assert facts_of(load_run(folder), running=False)["scores"]["bc"]["mean"] == 5.5


def test_utilisation_is_of_the_last_minutes_of_the_same_processes():
    learner = [timing("learner", t, {"update/model": (0.5 * t, t), "wait/replay": (0.25 * t, t)}, workers=2) for t in (100, 200, 600)]
    assert roles_of(learner) == [Role("learner", 2, 0.25, {"replay": 0.125})]
    slow = [*learner[:2], timing("learner", 600, {"update/model": (100.0 + 360, 900), "wait/replay": (50.0, 200)}, workers=2)]
    assert roles_of(slow) == [Role("learner", 2, 0.45, {})], "the 400 s since the row that is at least five minutes old"
    late = [timing("driver", 100, {"x": (1.0, 1)}), timing("driver", 300, {"x": (2.0, 2)}), timing("rollout", 300, {"step": (50.0, 9), "step/a": (9.0, 9)})]
    assert [r for r in roles_of(late) if r.role == "rollout"] == [Role("rollout", 1, 0.25, {})], "it began after the first burst; step/a is in step"
    again = [timing("planner", 100, {"plan": (90.0, 90)}), timing("planner", 200, {"plan": (10.0, 5)})]
    assert roles_of(again) == [Role("planner", 1, 0.1, {})], "restarted: all its time is since then"
    resumed = [*learner, {"kind": "resume", "wall_s": 600.0}, timing("learner", 610, {"update/model": (5.0, 3)})]
    assert roles_of(resumed) == [Role("learner", 1, 0.5, {})]
    assert roles_of([]) == []


FULL = {"task": "halfcheetah-medium", "env_id": "HalfCheetah-v4", "run": "runs/demo", "state": "stopped", "phase": "online", "row_age_s": 65.0, "wall_s": 432.0,
        "env_steps": 24_800, "updates": 14_200, "policy_updates": 16_000, "resumes": 2,
        "resume": "modip train --config runs/demo/config.yaml run_dir=runs/demo",
        "scores": {"bc": {"mean": 4872.0, "ci95": [4814.0, 4926.0], "episodes": 20, "env_steps": 0},
                   "mpc": {"mean": 7545.0, "ci95": [7167.0, 7758.0], "episodes": 20, "env_steps": 20_000}},
        "roles": [Role("planner", 1, 0.41, {"requests": 0.3}), Role("rollout", 16, 0.02, {"planner": 0.6, "learning" * 9: 0.2}), Role("odd", 1, 1.2, {})],
        "gauges": {"planner": {"rows_per_batch": 7.8, "answer_ms": 12.25}, "rollout": {f"number_{i}": float(i) for i in range(20)}},
        "incidents": [f"rollout worker {i} died (ActorDiedError); a new one is asked for, 3 there, which is a longer line" for i in range(5)],
        "checkpoint": {"name": "step_000024000_u0014000", "age_s": 41.0, "mb": 12.3}}


def full(folder: Path) -> dict:
    write(folder, row("phase", "online", 0.0, 0), row("system", "online", 60.0, 620))
    return FULL | {"progress": facts_of(load_run(folder), running=True)["progress"]}


@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_text_fits_the_terminal(folder, width):
    text = status_text(full(folder), width)
    for line in text.splitlines():
        assert len(line) <= width or line.startswith("go on with: "), line
        assert line == line.rstrip() and "\x1b" not in line
    words = " ".join(text.split())
    for part in ("halfcheetah-medium runs/demo", "stopped, last row 1:05 ago; no process", "62 % 620/1,000 steps", "10.3 steps/s, 0:37 left",
                 "24,800 env steps in 7:12, resumed 2 times", "BC 4,872 1.00 4,814 .. 4,926 20", "MPC 7,545 1.55", "41 % requests 30 %", "rollout x16",
                 "rows per batch 7.8, answer ms 12.2", "5 incidents, the newest 3:", "step_000024000_u0014000: 0:41 old, 12.3 MB", FULL["resume"]):
        assert part in words, (part, text)
    assert text.count("rollout worker") == 3 and ("20,000" in text) == (width >= 72)


def test_colours_are_only_ink(folder):
    facts = full(folder)
    colored = status_text(facts, 80, color=True)
    assert "\x1b[" in colored and re.sub(r"\x1b\[\d+m", "", colored) == status_text(facts, 80)


def test_the_lock_says_whether_a_process_works_on_it(folder):
    assert not is_open(folder)
    with open(folder / ".lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        assert is_open(folder) and gather(folder)["state"] == "running" and gather(folder)["resume"] is None
    assert not is_open(folder) and gather(folder)["state"] == "stopped"
    with open(folder / ".lock") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)                          # asking has left it free


def test_of_a_resumed_run_only_the_newest_process_is_shown(folder):
    """Its learner worked 380 s of 420; the one before, half of its time, with a queue."""
    write(folder, row("phase", "online", 0.0, 0), row("system", "online", 200.0, 500) | {"planner/queued": 77.0},
          timing("learner", 200.0, {"update/model": (100.0, 50)}))
    write(folder, row("system", "online", 220.0, 500), timing("learner", 620.0, {"update/model": (380.0, 400)}),
          resumed_at={"phase": "online", "env_steps": 500, "updates": 500, "wall_s": 200.0})
    facts = gather(folder)
    assert facts["roles"][0].busy == pytest.approx(380 / 420) and facts["resumes"] == 1 and "queued" not in facts["gauges"].get("planner", {})


def test_a_folder_without_rows_yet_has_a_status(folder):
    facts = gather(folder)
    assert (facts["state"], facts["phase"], facts["row_age_s"]) == ("stopped", "data", None)


def test_what_is_no_run_folder_or_broken_is_said_in_one_line(tmp_path, folder):
    for run, word in ((tmp_path / "nowhere", "expected a run folder"), (folder, "line 1")):
        (folder / "metrics.jsonl").write_text("{broken\n{}\n")
        with pytest.raises(RunError, match=word):
            gather(run)
    done = status(str(tmp_path / "nowhere"))
    assert done.returncode == 2 and done.stderr.startswith("modip status: ") and done.stderr.count("\n") == 1
    wrong = status(str(folder), "--watch", "soon")
    assert wrong.returncode == 2 and "expected seconds" in wrong.stderr


def on_terminal(args: list[str], **env: str) -> str:
    """What the command writes to a terminal (a pseudo one)."""
    ours, theirs = pty.openpty()
    subprocess.run([sys.executable, "-m", "modip_ray", "status", *args], cwd=ROOT, env=ENV | {"TERM": "xterm", **env}, stdout=theirs, timeout=120, check=True)
    os.close(theirs)
    with open(ours, "rb", closefd=True) as file:
        return file.read1(1 << 20).decode()


def test_colours_on_a_terminal_only_and_not_with_no_color(folder):
    write(folder, row("phase", "online", 0.0, 0))
    assert "\x1b[" in on_terminal([str(folder)])
    assert "\x1b" not in on_terminal([str(folder)], NO_COLOR="1") and "\x1b" not in status(str(folder)).stdout


def test_a_run_that_is_killed_gone_on_with_and_finished(tmp_path):
    """Watched while it runs; the command that status names for the stopped run resumes it with the very same settings."""
    run = tmp_path / "a run"
    data = write_data(tmp_path / "data.hdf5")
    args = command(run, data, serial=True, online__env_steps=600, log__checkpoint_every_s=0.2, eval__every_steps=200, task__env="tests.fakes:PacedPointEnv")

    def online():
        facts = gather(run) if (run / "config.yaml").is_file() else {}
        return facts and facts["phase"] == "online" and facts["env_steps"] > 0 and facts["checkpoint"]
    process = start_and_wait(args, online, tmp_path / "log", ENV | {"POINT_STEP_S": "0.05"})
    watch = subprocess.Popen([sys.executable, "-m", "modip_ray", "status", str(run), "--watch", "0.2", "--json"], cwd=ROOT, env=ENV, text=True,
                             stdout=subprocess.PIPE)
    first = json.loads(watch.stdout.readline())
    assert first["state"] == "running" and first["gauges"]["replay"]["transitions"] > 0 and first["scores"]["bc"]["env_steps"] == 0
    process.send_signal(signal.SIGKILL)
    process.wait()
    facts = gather(run)
    assert facts["state"] == "stopped" and {r.role for r in facts["roles"]} >= {"driver", "learner", "rollout"}
    assert "'" in facts["resume"], "the folder's name has a space"
    text = status(str(run), COLUMNS="60").stdout
    assert f"go on with: {facts['resume']}" in text

    program, *rest = shlex.split(facts["resume"])
    again = modip(*rest)
    assert program == "modip" and again.returncode == 0, again.stderr
    last = json.loads(watch.communicate(timeout=120)[0].splitlines()[-1])
    assert watch.returncode == 0, "it ends with the run"
    assert (last["state"], last["phase"], last["resumes"]) == ("finished", "finished", 1) and last["env_steps"] >= 600
    assert set(last["scores"]) == {"data", "bc", "policy", "mpc"}
    assert "\n\nreturn" in status(str(run)).stdout


def test_watching_ends_with_ctrl_c(folder):
    write(folder, row("phase", "online", 0.0, 0))
    watch = subprocess.Popen([sys.executable, "-m", "modip_ray", "status", str(folder), "--watch", "0.1"], cwd=ROOT, env=ENV, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True)
    assert watch.stdout.readline().startswith("point")
    time.sleep(0.3)
    watch.send_signal(signal.SIGINT)
    _, errors = watch.communicate(timeout=120)
    assert watch.returncode == 0 and errors == ""
