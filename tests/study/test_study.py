"""A study: its file, its tables from finished runs, and a real one on a tiny task."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from modip_ray.config import ConfigError
from modip_ray.runfolder import RunError, is_open
from modip_ray.study import run as driver
from modip_ray.study.kept import evaluations, keep, outcome
from modip_ray.study.run import run_study
from modip_ray.study.spec import build_study, load_study
from modip_ray.study.table import markdown, nested_ci, results, write_results
from modip_ray.tasks import scores
from tests.fakes import SMALL, write_data

ROOT = Path(__file__).resolve().parents[2]
TASK = "halfcheetah-medium"         # a name of configs/tasks; its settings are replaced by those of the tiny task


def study(out: Path, **fields):
    own = {"out": str(out), "tasks": {TASK: {}}, "methods": {"modip": {}, "no_planner": {"planner.iterations": 0}}, "seeds": [0, 1], "settings": SMALL}
    return build_study({**own, **fields}, "a test", "tiny")


def put_summary(cell, bc: float, policy: float, mpc: float, rng: np.random.Generator) -> None:
    """A finished run's summary, scores with some spread; those of its start are the same for all methods of a training seed."""
    scores, start = {}, np.random.default_rng(cell.seed)
    for mode, mean in (("data", bc), ("bc", bc), ("policy", policy), ("mpc", mpc)):
        values = (mean + (start if mode in ("data", "bc") else rng).normal(0, 1, 20)).tolist()
        scores[mode] = {"metric": "return", "mean": float(np.mean(values)), "ci95": [mean - 1, mean + 1], "episodes": 20, "values": values, "returns": values,
                        "seeds": list(range(20)), "normalized": None, "also": {}}
    cell.folder.mkdir(parents=True, exist_ok=True)
    (cell.folder / "summary.json").write_text(json.dumps({"task": cell.task, "scores": scores, "env_steps": 400, "updates": 160, "wall_s": 60.0,
                                                          "phase_s": {"pretrain": 5.0, "online": 40.0, "eval": 10.0},
                                                          "config_hash": cell.cfg.hash(), "git": 40 * "a" + "+changes"}))


def test_every_seed_has_one_start_that_its_methods_share(tmp_path):
    cells = study(tmp_path).cells()
    assert [c.name for c in cells[:3]] == [f"{TASK}/start/seed_0", f"{TASK}/modip/seed_0", f"{TASK}/no_planner/seed_0"] and len(cells) == 6
    assert cells[1].start is cells[0] and cells[1].cfg.pretrain.start == str(cells[0].folder) and cells[0].cfg.online.env_steps == 0
    assert cells[2].cfg.planner.iterations == 0 and cells[4].cfg.seed == 1
    own = study(tmp_path, methods={"modip": {}, "mlp": {"policy.kind": "gaussian", "pretrain.start": None}}).cells()[2]
    assert own.cfg.pretrain.start is None and own.cfg.policy.kind == "gaussian" and own.start == cells[0]


@pytest.mark.parametrize("fields, message", [
    ({"tasks": {"halfcheetah-medum": {}}}, "halfcheetah-medium"),
    ({"tasks": {"mine": {"task": "lift-hp"}}}, "'lift-hp'.*did you mean 'lift-ph'"),
    ({"settings": {"task": "lift-ph"}}, "task is set by the study itself"),
    ({"methods": {"start": {}}}, "not 'start'"),
    ({"methods": {}}, "names none"),
    ({"methods": {"../x": {}}}, "folders"),
    ({"seeds": [0, 0]}, "different"),
    ({"seeds": []}, "different"),
    ({"methods": {"modip": {"pretrain.start": "x"}}}, "pretrain.start is set by the study itself"),
    ({"settings": {"seed": 3}}, "seed is set by the study itself"),
    ({"at_once": 0}, "at least 1"),
    ({"method": {}}, "methods"),
])
def test_a_wrong_file_is_named(tmp_path, fields, message):
    with pytest.raises(ConfigError, match=message):
        study(tmp_path, **fields)


@pytest.mark.parametrize("tree, override, words", [("methods: [a, b]", "methods.a.x=1", "expected a mapping"),
                                                   ("methods: {a: }", "seeds=[[0]]", "whole numbers")])
def test_a_file_whose_fields_are_of_another_kind_is_named(tmp_path, tree, override, words):
    file = tmp_path / "x.yaml"
    file.write_text(f"tasks: {{{TASK}: }}\n{tree}\n")
    with pytest.raises(ConfigError, match=words):
        load_study(file, [override])


def test_a_task_may_have_another_name(tmp_path):
    cell = study(tmp_path, tasks={"lift": {"task": "lift-ph", "online.env_steps": 70, "policy.denoising_steps": 20}}).cells()[1]
    assert cell.name == "lift/modip/seed_0" and cell.cfg.task.metric == "success" and cell.cfg.online.env_steps == 70


def test_a_wrong_setting_of_a_method_is_named_before_anything_runs(tmp_path):
    with pytest.raises(ConfigError, match="method no_planner.*'iteration'"):
        study(tmp_path, methods={"modip": {}, "no_planner": {"planner.iteration": 0}}).cells()
    with pytest.raises(ConfigError, match=f"task {TASK}, .*set task.family=walker2d"):
        study(tmp_path, settings=SMALL | {"task.env": "Walker2d-v4", "task.family": "hopper"}).cells()


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_folder_that_cannot_be_written_is_said(tmp_path, monkeypatch, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=f"out: '.*{place}' cannot be made or written .*; choose another out"):
        run_study(study(tmp_path / place))
    monkeypatch.setattr("os.access", lambda *args: False)
    with pytest.raises(ConfigError, match="results.json: cannot be written, the rights are missing"):
        write_results(study(tmp_path / "study"))


def test_the_home_folder_of_out_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    s = study("~/out", kept="~/kept")
    start, cell = s.cells()[:2]
    assert (s.folder, s.kept_folder) == (tmp_path / "out", tmp_path / "kept") and s.to_dict()["out"] == "~/out"
    assert cell.folder == tmp_path / "out" / cell.name and cell.cfg.pretrain.start == str(start.folder) and cell.kept == tmp_path / "kept" / cell.name


def test_the_memory_of_an_interval_is_that_of_a_block_and_its_ends_are_the_same(monkeypatch):
    groups = [np.random.default_rng(k).normal(size=2000 + k) for k in range(3)]
    whole = nested_ci(groups, 300)                                                  # 300 draws of 2,000 values: 5 MB of indices, and as much of values
    monkeypatch.setattr(scores, "_BLOCK", 20_000)
    tracemalloc.start()
    try:
        assert nested_ci(groups, 300) == whole and tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()


def test_shipped_studies_load():
    for path in sorted((ROOT / "configs" / "studies").glob("*.yaml")):
        loaded = load_study(path.stem, ["seeds=[7]", "methods.modip.guard.trust=0.1", "settings.eval.episodes=3"])
        assert {c.cfg.eval.episodes for c in loaded.cells() if c.start} == {3} and loaded.methods["modip"]["guard.trust"] == 0.1


def test_interval_covers_the_spread_between_seeds():
    rng = np.random.default_rng(0)
    alike = [rng.normal(10, 1, 50) for _ in range(3)]
    apart = [rng.normal(m, 1, 50) for m in (5, 10, 15)]
    low, high = nested_ci(alike)
    assert low < 10.1 and high > 9.9 and high - low < 1
    low, high = nested_ci(apart)
    assert low < 7 and high > 13


def test_the_episodes_of_a_seed_that_is_drawn_again_are_drawn_again():
    """Three seeds that differ in nothing: the mean of the drawn ones varies as that of 3 x 50 episodes (a seed that is drawn twice with the same episodes
    makes it 5/3 of that)."""
    values = np.random.default_rng(0).normal(10, 1, 50)
    low, high = nested_ci([values] * 3, 20_000)
    assert (high - low) / 2 / 1.96 == pytest.approx(values.std() / 150 ** 0.5, rel=0.05)


def test_tables_of_finished_runs(tmp_path):
    s, rng = study(tmp_path), np.random.default_rng(0)
    for cell in s.cells():
        if cell.method == "modip":
            put_summary(cell, 100, 120, 150, rng)
        elif cell.method == "no_planner" and cell.seed == 0:
            put_summary(cell, 100, 90, 95, rng)
    found = results(s)
    entry = found["tasks"][TASK]
    assert entry["metric"] == "return" and entry["mpc"]["seeds"] == 2 and entry["mpc"]["episodes"] == 40 and entry["env_steps"] == 400
    assert abs(entry["mpc"]["mean"] - 150) < 1 and entry["mpc"]["ci95"][0] < entry["mpc"]["mean"] < entry["mpc"]["ci95"][1]
    assert abs(entry["against_bc"]["policy"]["share"] - 0.2) < 0.02
    other = found["methods"]["no_planner"][TASK]
    assert other["seeds_done"] == 1 and found["over_tasks"] == {} and entry["against_first"] is None
    assert other["against_first"]["mean"] == pytest.approx(other["mpc"]["mean"] - entry["mpc"]["by_seed"][0])       # of the seed that both have
    text = markdown(found, [])
    assert "1 of 2" in text and "1.50 x" in text and "Paper: BC 5108" in text and "start + 0:05 / 0:40 / 0:10" in text and "commit aaaaaaaa+changes." in text
    assert "20 episodes for each training seed" in text and "Curves:" not in text and "times BC are given" not in text


def test_what_trains_its_own_policy_is_not_said_in_times_of_its_bc(tmp_path):
    s = study(tmp_path, methods={"modip": {}, "mlp": {"policy.kind": "gaussian", "pretrain.start": None}})
    for cell in s.cells():
        put_summary(cell, 100, 120, 150, np.random.default_rng(0))
    text = markdown(results(s), ["curves.png"])
    row = next(line for line in text.splitlines() if line.startswith("| mlp "))
    assert " x" not in row and "| 0:05 / 0:40 / 0:10 |" in row and "same BC policy, but mlp: their BC is a policy of their own" in text and "Curves:" in text


def test_a_study_goes_on_from_what_was_kept(tmp_path, monkeypatch):
    """As on another machine, where no run folder is: neither the kept run nor its start is run again; with other settings both are."""
    s = study(tmp_path / "out", kept=str(tmp_path / "kept"), methods={"modip": {}})
    start, run, *_ = s.cells()
    put_summary(run, 100, 120, 150, np.random.default_rng(0))
    (run.folder / "config.yaml").write_text(run.cfg.dump())
    first, void, last = ({"kind": "eval", "mode": "mpc", "env_steps": n, "updates": n, "wall_s": 9.0, "mean": 150.0} for n in (100, 200, 300))
    rows = [{"kind": "train", "loss": 1}, first, void, {"kind": "resume", "env_steps": 150, "updates": 150}, last]
    (run.folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    keep(run)
    for name in run.folder.iterdir():
        name.unlink()
    assert outcome(run) == run.kept and [r["env_steps"] for r in evaluations(run.kept)] == [100, 300] and outcome(start) is None
    began = []
    monkeypatch.setattr("modip_ray.study.run.run_cells", lambda todo, at_once, stop: began.extend(todo) or [])
    found = run_study(s)
    assert [c.name for c in began] == [c.name for c in s.cells()[2:]] and found["tasks"][TASK]["seeds_done"] == 1
    assert (s.folder / f"curves_{TASK}.png").is_file() and (tmp_path / "kept" / f"curves_{TASK}.png").is_file()
    assert json.loads((tmp_path / "kept.json").read_text())["tasks"] == found["tasks"]
    assert outcome(study(tmp_path / "out", kept=str(tmp_path / "kept"), settings=SMALL | {"critic.width": 24}).cells()[1]) is None
    (run.kept / "config.yaml").write_text("critic: {gone: 1}\n")                    # a setting that this version does not have
    assert outcome(run) is None


def test_only_runs_of_one_start_are_paired(tmp_path):
    """A start that was made again elsewhere gives other data and another BC: a difference to it would be of both."""
    s = study(tmp_path, methods={"modip": {}, "tail": {"planner.tail": "policy_q"}, "chunks": {"policy.n_action_steps": 2}})
    rng, other = np.random.default_rng(0), {("tail", 1): "data", ("chunks", 0): "bc"}       # chunks act otherwise before they are tuned, too
    for cell in s.cells():
        put_summary(cell, 100, 120, 150, rng)
        if name := other.get((cell.method, cell.seed)):
            summary = json.loads((cell.folder / "summary.json").read_text())
            summary["scores"][name]["values"][0] += 1e-9
            (cell.folder / "summary.json").write_text(json.dumps(summary))
    found = results(s)
    tail, chunks = (found["methods"][m][TASK] for m in ("tail", "chunks"))
    assert tail["other_start"] == [1] and chunks["other_start"] == []
    assert tail["against_first"]["mean"] == pytest.approx(tail["mpc"]["by_seed"][0] - found["tasks"][TASK]["mpc"]["by_seed"][0])
    assert markdown(found, []).count("(*)") == 2


def test_methods_with_other_evaluation_episodes_are_not_paired(tmp_path):
    s = study(tmp_path, methods={"modip": {}, "few": {"eval.episodes": 5}, "elsewhere": {"eval.seed": 7}})
    for cell in s.cells():
        put_summary(cell, 100, 120, 150, np.random.default_rng(0))
        summary = json.loads((cell.folder / "summary.json").read_text())
        for score in summary["scores"].values():
            score["seeds"] = [seed + cell.cfg.eval.seed for seed in score["seeds"]]
            if cell.method == "few":
                score |= {k: score[k][:5] for k in ("values", "returns", "seeds")}
        (cell.folder / "summary.json").write_text(json.dumps(summary))
    found = results(s)
    assert [found["methods"][m][TASK]["against_first"] for m in ("few", "elsewhere")] == [None, None]
    assert "same seeds, but few, elsewhere, with evaluation settings of their own" in markdown(found, [])


def test_times_of_runs_that_did_not_time_evaluations_apart_are_marked(tmp_path):
    s = study(tmp_path, settings=SMALL | {"serial": True, "eval.every_steps": 100})
    for cell in s.cells():
        put_summary(cell, 100, 120, 150, np.random.default_rng(0))
        if cell.method == "modip":
            summary = json.loads((cell.folder / "summary.json").read_text())
            summary["phase_s"]["eval on the way"] = 65.0
            (cell.folder / "summary.json").write_text(json.dumps(summary))
    text = markdown(results(s), ["curves.png"])
    assert "| start + 0:05 / 0:40 / 1:15 |" in text and "| start + 0:05 / 0:40 / 0:10 (+) |" in text and "evaluations not counted (+)." in text


def test_kept_results_are_not_replaced_by_fewer(tmp_path, capsys):
    s, kept = study(tmp_path / "out", kept=str(tmp_path / "kept"), methods={"modip": {}}), tmp_path / "kept.json"
    for cell in s.cells():
        put_summary(cell, 100, 120, 150, np.random.default_rng(0))
    write_results(s)
    before = kept.read_text()
    write_results(dataclasses.replace(s, seeds=[0]))
    assert kept.read_text() == before and f"stays as it is: it has what this study has not ({TASK}/modip)" in capsys.readouterr().err
    kept.write_text("[]")
    write_results(s)
    assert kept.read_text() == "[]" and "something that no study writes" in capsys.readouterr().err
    assert load_study("main", [f"out={tmp_path / 'mine'}"]).kept is None and load_study("main").kept is not None


def test_a_run_that_ended_unseen_is_kept_and_one_of_other_settings_stays(tmp_path, capsys):
    def of(**settings):
        return study(tmp_path / "out", kept=str(tmp_path / "kept"), methods={"modip": {}}, seeds=[0], settings=SMALL | settings)

    def end(s, mpc):
        cell = s.cells()[1]
        put_summary(cell, 100, 120, mpc, np.random.default_rng(0))
        (cell.folder / "config.yaml").write_text(cell.cfg.dump())
        run_study(s)
        return json.loads((cell.kept / "summary.json").read_text())["scores"]["mpc"]["mean"]
    first = end(of(), 150)
    shutil.rmtree(tmp_path / "out")
    assert end(of(**{"eval.episodes": 3}), 90) == first > 140
    shutil.rmtree(tmp_path / "kept")
    assert end(of(**{"eval.episodes": 3}), 90) < 100


def test_over_tasks_by_rliable(tmp_path):
    s, rng = study(tmp_path, settings=SMALL | {"task.family": "halfcheetah"}), np.random.default_rng(0)
    for cell in s.cells():
        if cell.start is not None:
            put_summary(cell, 4000, 5000, 6000 if cell.method == "modip" else 4500, rng)
    found = results(s)["over_tasks"]
    assert found["modip"]["mpc"]["iqm"] == pytest.approx(100 * (6000 + 280.178953) / (12135.0 + 280.178953), abs=0.1)
    low, high = found["modip"]["mpc"]["ci95"]
    assert low < found["modip"]["mpc"]["iqm"] < high and found["no_planner"]["mpc"]["iqm"] < low
    assert results(dataclasses.replace(s, seeds=[0]))["over_tasks"] == {}           # of one training seed there is no interval
    np.random.seed(7)                                                               # nobody's draws but its own count, and it takes none of anybody's
    assert results(s)["over_tasks"] == found and np.random.rand() == np.random.RandomState(7).rand()


class Sleeper:
    """In a run's place: a process that has the lock of its folder, and ends well when it is told to."""

    code = ("import fcntl, pathlib, signal, sys, time; folder = pathlib.Path(sys.argv[1]); folder.mkdir(parents=True, exist_ok=True); "
            "lock = open(folder / '.lock', 'w'); fcntl.flock(lock, fcntl.LOCK_EX); signal.signal(signal.SIGTERM, lambda *a: sys.exit(0)); "
            "(folder / 'there').touch(); time.sleep(float(sys.argv[2]))")

    @classmethod
    def start(cls, folder: Path, seconds: float) -> subprocess.Popen:
        process = subprocess.Popen([sys.executable, "-c", cls.code, str(folder), str(seconds)])
        while not (folder / "there").exists():
            time.sleep(0.02)
        return process


def test_a_run_that_an_earlier_driver_left_behind_is_waited_for(tmp_path, monkeypatch, capsys):
    cell = study(tmp_path).cells()[0]
    left, begun = Sleeper.start(cell.folder, 4.0), []
    monkeypatch.setattr(driver, "launched", lambda c: begun.append(is_open(c.folder)) or driver.Running(c, left, 0.0))
    monkeypatch.setattr(driver, "note", lambda one, stopped: True)
    assert driver.run_cells([cell], 1, SimpleNamespace(asked=False)) == [] and begun == [False] and left.wait(60) == 0
    assert capsys.readouterr().out.count("is run by another process") == 1


def test_whatever_ends_the_driver_ends_its_runs(tmp_path, monkeypatch):
    cells = study(tmp_path).cells()[:4:3]
    runs = []
    monkeypatch.setattr(driver, "launched", lambda c: runs.append(Sleeper.start(c.folder, 60)) or driver.Running(c, runs[-1], 0.0))

    class Stop:
        @property
        def asked(self):
            if len(runs) == 2:
                raise OSError("the terminal is gone")
            return False
    with pytest.raises(OSError, match="terminal"):
        driver.run_cells(cells, 2, Stop())
    assert [run.poll() for run in runs] == [0, 0]


def test_a_real_study_is_stopped_and_goes_on(tmp_path, monkeypatch):
    """Serial runs: Ctrl-C in the first one that acts, then the same command; every method begins with the start's BC policy."""
    data = write_data(tmp_path / "data.hdf5")
    settings = SMALL | {"serial": True, "data.source": str(data), "online.env_steps": 200, "eval.every_steps": 100}
    file = tmp_path / "tiny.yaml"
    file.write_text(json.dumps({"out": str(tmp_path / "out"), "tasks": {TASK: {}}, "methods": {"modip": {}, "tail": {"planner.tail": "policy_q"}}, "seeds": [0],
                                "settings": settings}))
    command = [sys.executable, "-m", "modip_ray", "study", str(file)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    for line in first.stdout:
        if f"{TASK}/modip/seed_0" in line:
            break
    first.send_signal(signal.SIGINT)
    said = first.communicate(timeout=300)[0]
    assert first.returncode == 0 and f"the same command goes on: python -m modip_ray study {file}" in said
    second = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
    assert second.returncode == 0, second.stdout + second.stderr
    assert f"{TASK}/start/seed_0 done" not in second.stdout                         # it had been done
    study_ = load_study(file)
    assert all(outcome(c) == c.folder for c in study_.cells())
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    bc = {m: found["methods"][m][TASK]["bc"]["by_seed"] for m in ("modip", "tail")}
    assert bc["modip"] == bc["tail"]
    assert (tmp_path / "out" / f"curves_{TASK}.png").stat().st_size > 5_000 and TASK in (tmp_path / "out" / "results.md").read_text()
    monkeypatch.setattr("modip_ray.study.run.launched", None)                       # a finished study only writes its tables
    assert run_study(study_)["tasks"][TASK]["seeds_done"] == 1
