"""A whole search with Ray Tune that is stopped, killed and resumed. In a file of its own: it is the longest test."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from modip_ray.config import ConfigError, load
from modip_ray.search.spec import load_search
from tests.fakes import write_data
from tests.test_tune import params

ROOT = Path(__file__).resolve().parents[1]
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


def reports(log: Path) -> list[tuple[int, int]]:
    """(trial, iteration) of each line of the terminal."""
    return [(int(t), int(k)) for t, k in re.findall(r"^trial (\d+): (\d+) of", log.read_text(), re.M)]


def start_and_wait(command: list[str], log: Path, ready: Callable[[], bool]) -> subprocess.Popen:
    """Start a search and wait until `ready()` holds."""
    process = subprocess.Popen(command, cwd=ROOT, env=ENV, stdout=log.open("w"), stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 300
    while not ready():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    return process


def finished_by_state(out: Path) -> int:
    """Trials that Tune's newest state on the disk calls finished."""
    states = sorted((out / "trials").glob("experiment_state-*.json"))
    return states[-1].read_text().count("TERMINATED") if states else 0


@pytest.mark.ray
def test_eight_trials_stopped_killed_and_resumed(tmp_path, monkeypatch):
    from ray import tune

    from modip_ray.search.run import run_search
    data = write_data(tmp_path / "data.hdf5", 600)
    file, out = tmp_path / "asha.yaml", tmp_path / "search"
    slow = params(data, online__updates_per_step=1.0, eval__every_episodes=5)          # iterations of most of a second: Tune's state is a second old
    file.write_text(yaml.safe_dump({
        "out": str(out), "settings": {k: v for k, v in slow.items() if k not in ("steps_per_iteration", "online.env_steps")},
        "search": {"guard.trust": {"uniform": [0.0, 0.5]}, "planner.horizon": {"choice": [2, 3]}, "policy.lr": {"loguniform": [1e-4, 1e-2]}},
        "scheduler": {"kind": "asha", "grace_period": 1, "reduction_factor": 2}, "num_samples": 8, "iterations": 3,
        "steps_per_iteration": 40}))
    command = [sys.executable, "-m", "modip_ray", "tune", str(file)]
    logs = [tmp_path / "log1", tmp_path / "log2", tmp_path / "log3"]
    stopped = start_and_wait(command, logs[0], lambda: bool(reports(logs[0])))
    stopped.terminate()
    assert stopped.wait(300) == 0 and "the same command goes on" in logs[0].read_text() and "Traceback" not in logs[0].read_text(), logs[0].read_text()
    killed = start_and_wait(command, logs[1], lambda: finished_by_state(out) >= 2 and len({t for t, _ in reports(logs[1])}) >= 3)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (out / "results.json").exists()
    (out / "trials" / "tuner.pkl").write_bytes(b"")                                 # as a kill leaves it while Tune writes it
    known = tune.ExperimentAnalysis(str(out / "trials")).trials                     # as Tune's state of that moment has it
    finished = {int(t.experiment_tag.split("_")[0]) for t in known if t.is_finished()}
    saved = {int(t.experiment_tag.split("_")[0]): t.latest_checkpoint_result.metrics["training_iteration"] for t in known if t.latest_checkpoint_result}
    rows = {t.trial_id: (out / "trials" / t.relative_logdir / "result.json").read_text() for t in known if t.is_finished()}
    assert finished and saved

    done = subprocess.run(command, cwd=ROOT, env=ENV, stdout=logs[2].open("w"), stderr=subprocess.STDOUT, timeout=1200)
    text = logs[2].read_text()
    assert done.returncode == 0 and "goes on from" in text and "Traceback" not in text, text
    second = reports(logs[2])
    assert not finished & {t for t, _ in second}, "no finished trial is run again"
    for trial, at in saved.items():
        again = [k for t, k in second if t == trial]
        assert again == list(range(at + 1, at + 1 + len(again))), f"trial {trial} had a checkpoint of iteration {at} and reported {again} after the resume"
    for t in known:
        if t.trial_id in rows:
            assert (out / "trials" / t.relative_logdir / "result.json").read_text() == rows[t.trial_id]

    found = json.loads((out / "results.json").read_text())
    assert [t["trial"] for t in sorted(found["trials"], key=lambda t: t["trial"])] == list(range(8))
    for t in found["trials"]:
        assert [h["training_iteration"] for h in t["history"]] == list(range(1, t["iterations"] + 1))
        steps, updates = [h["env_steps"] for h in t["history"]], [h["updates"] for h in t["history"]]
        assert steps == sorted(set(steps)) and updates == sorted(updates)
        assert t["status"] == "finished" if t["iterations"] == 3 else t["status"].startswith("stopped at")
    whole = [t for t in found["trials"] if t["status"] == "finished"]
    assert 0 < len(whole) < 8 and found["trials"][:len(whole)] == whole, "those that came furthest first"
    assert found["best"] == max(whole, key=lambda t: t["mpc/mean"])["trial"] == found["trials"][0]["trial"]
    assert f"| {found['best']} |" in (out / "results.md").read_text() and (out / "parallel.svg").read_text().count("<svg") == 1
    assert (out / "parallel.png").read_bytes().startswith(b"\x89PNG")
    best = load(out / "best.yaml")
    assert best.guard.trust == found["trials"][0]["params"]["guard.trust"] and best.online.env_steps == 120

    monkeypatch.setattr("modip_ray.search.run.started", None)                       # a finished search only shows its table: Ray is not started
    assert run_search(load_search(file)) == found
    with pytest.raises(ConfigError, match="num_samples: 8 -> 9"):
        run_search(load_search(file, ["num_samples=9"]))
