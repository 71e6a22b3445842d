"""The command line, end to end: train -> kill -9 -> the same command -> eval; and the driver's own promises."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

from modip_ray.cli import main
from modip_ray.config import ConfigError
from modip_ray.config import load as settings
from modip_ray.learning.checkpoint import CheckpointError, begin, commit, folders, newest, read_state
from modip_ray.learning.env_source import env_factory
from modip_ray.policy import load
from modip_ray.report.metrics import read_metrics
from modip_ray.run import callable_name, train
from modip_ray.runfolder import RunError, RunFolder, command_line, is_open, read_summary
from modip_ray.tasks.dataset import DataError
from modip_ray.tasks.envs import EnvError
from tests.fakes import SMALL, PointEnv, small, write_data

ROOT = Path(__file__).resolve().parents[2]
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
SYSTEMS = pytest.mark.parametrize("serial", [True, pytest.param(False, marks=pytest.mark.ray)], ids=["serial", "ray"])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "data.hdf5")


def command(run_dir: Path, data: Path, **dotted) -> list[str]:
    settings = SMALL | {"run_dir": str(run_dir), "data.source": str(data)} | {k.replace("__", "."): v for k, v in dotted.items()}
    return [sys.executable, "-m", "modip_ray", "train", *(f"{k}={json.dumps(v) if not isinstance(v, str) else v}" for k, v in settings.items())]


def modip(*args: str) -> subprocess.CompletedProcess:
    """`modip ARGS`, in this process: it has torch loaded."""
    out, errors = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(errors), pytest.raises(SystemExit) as ended:
        main(args)
    return subprocess.CompletedProcess(args, ended.value.code, out.getvalue(), errors.getvalue())


def start_and_wait(args: list[str], ready, log: Path, env: dict[str, str] = ENV) -> subprocess.Popen:
    """Start a run and wait until `ready()` holds."""
    process = subprocess.Popen(args, cwd=ROOT, env=env, stdout=log.open("w"), stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 300
    while not ready():
        assert process.poll() is None, f"the run ended early:\n{log.read_text()}"
        assert time.monotonic() < deadline, f"not ready in time:\n{log.read_text()}"
        time.sleep(0.05)
    return process


def online_checkpoint(run: Path):
    """An online checkpoint with some progress exists."""
    return lambda: any("_u" in p.name and not p.name.startswith("step_000000000") for p in folders(run / "checkpoints"))


@SYSTEMS
def test_train_kill_resume_eval(tmp_path, data, serial):
    run = tmp_path / "run"
    args = command(run, data, serial=serial, log__checkpoint_every_s=0.2, online__env_steps=900, eval__every_steps=450, task__env="tests.fakes:PacedPointEnv")
    first = start_and_wait(args, online_checkpoint(run), tmp_path / "log1", ENV | {"POINT_STEP_S": "0.05"})
    first.send_signal(signal.SIGKILL)
    first.wait()
    saved = newest(run / "checkpoints")
    assert saved.counters["phase"] == "online" and 0 < saved.counters["env_steps"] < 900
    assert not (run / "summary.json").exists()

    second = modip(*args[3:]) if serial else subprocess.run(args, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=900)
    assert second.returncode == 0, second.stderr
    assert "MPC" in second.stdout
    resume = [row for row in read_metrics(run) if row["kind"] == "resume"]
    assert [(r["phase"], r["env_steps"], r["updates"]) for r in resume] == [("online", saved.counters["env_steps"], saved.counters["updates"])]
    rows = read_metrics(run)
    after = rows[[row["kind"] for row in rows].index("resume"):]
    assert min(row["updates"] for row in after if "updates" in row) >= saved.counters["updates"], "the counters went on, not back"

    summary = json.loads((run / "summary.json").read_text())
    assert summary["env_steps"] >= 900 and summary["updates"] == 60 + int(0.25 * summary["env_steps"])
    assert {"task", "env_id", "run_dir", "scores", "env_steps", "updates", "wall_s", "phase_s", "versions", "git", "machine", "config_hash"} <= set(summary)
    for mode in ("data", "bc", "policy", "mpc"):
        assert set(summary["scores"][mode]) == {"metric", "mean", "ci95", "episodes", "normalized", "values", "returns", "seeds", "also"}
    assert (run / "report" / "index.html").is_file() and (run / "config.yaml").is_file()
    kinds = {(row["kind"], row.get("role") or row.get("mode")) for row in read_metrics(run)}
    assert {("train", None), ("data", None), ("diagnostics", None), ("eval", "bc"), ("eval", "policy"), ("eval", "mpc"), ("timing", "driver"),
            ("timing", "planner"), ("timing", "learner"), ("timing", "rollout"), ("timing", "evaluator")} <= kinds

    for mode in ("bc", "policy", "mpc") if serial else ("mpc",):
        out = tmp_path / f"{mode}.json"
        again = modip("eval", str(run), "--mode", mode, "--episodes", "4", "--seed", str(summary["scores"][mode]["seeds"][0]), "--json", str(out))
        assert again.returncode == 0, again.stderr
        assert json.loads(out.read_text())["returns"] == summary["scores"][mode]["returns"]

    if not serial:
        return
    other = modip("eval", str(run), "--mode", "policy", "--episodes", "4", "--json", str(tmp_path / "other.json"), "--set", "policy.sampling_steps=1")
    assert other.returncode == 0, other.stderr
    assert json.loads((tmp_path / "other.json").read_text())["returns"] != summary["scores"]["policy"]["returns"]
    refused = modip("eval", str(run), "--set", "critic.gamma=0.5")
    assert refused.returncode == 2 and "only settings of acting" in refused.stderr
    third = modip(*args[3:])
    assert third.returncode == 0 and "MPC" in third.stdout and "evaluate" not in third.stderr, "a finished run only prints its table again"


def test_a_serial_run_is_a_function_of_its_seed_and_of_nothing_else(tmp_path, data):
    """Evaluations in the middle, and a stop with a resume in the offline phase, change nothing."""
    plain = train(small(tmp_path / "plain", data, serial=True, eval__every_steps=0))
    evaluated = train(small(tmp_path / "evaluated", data, serial=True, eval__every_steps=100))
    assert plain["scores"]["mpc"]["returns"] == evaluated["scores"]["mpc"]["returns"]
    a, b = (newest(tmp_path / name / "checkpoints") for name in ("plain", "evaluated"))
    for part in ("learner_model", "learner_policy", "replay.rows_0000000", "bc"):
        x, y = a.read(part), b.read(part)
        assert x.keys() == y.keys() and all(np.array_equal(x[k], y[k], equal_nan=x[k].dtype.kind == "f") for k in x), part


def test_no_file_of_a_checkpoint_needs_pickle(finished_run):
    last = folders(finished_run / "checkpoints")[0]
    assert {p.name for p in last.iterdir()} == {"counters.json", "done"} | \
        {f"{part}.safetensors" for part in ("learner_model", "learner_policy", "replay", "replay.rows_0000000", "bc", "collection")}
    assert all(read_state(p) for p in last.glob("*.safetensors"))


@pytest.fixture
def copied(finished_run, tmp_path):
    """A copy of the finished run, and the settings that go on in it."""
    run = shutil.copytree(finished_run, tmp_path / "run")
    return run, settings(run / "config.yaml").replace({"run_dir": str(run)})


def test_other_settings_are_refused_but_more_steps_are_not(copied):
    run, cfg = copied
    first = read_summary(run)
    with pytest.raises(ConfigError, match=r"critic.gamma: .* -> 0.5"):
        train(cfg.replace({"critic.gamma": 0.5}))
    more = train(cfg.replace({"online.env_steps": 120}))
    assert more["env_steps"] >= 120 > first["env_steps"] and more["scores"]["bc"]["returns"] == first["scores"]["bc"]["returns"]


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_from_zero(copied):
    run, cfg = copied
    (run / "summary.json").unlink()
    for folder in folders(run / "checkpoints"):
        (folder / "learner_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="none of"):
        train(cfg)


def test_a_journal_without_its_checkpoints_is_set_aside(tmp_path, data, capsys):
    """Whoever removes the checkpoints begins again: with the old online data in the replay BC would be fine-tuned before it is frozen."""
    cfg = small(tmp_path / "run", data)
    part = tmp_path / "run" / "journal" / "replay" / "part_000000"
    for phase, stays in (("online", True), ("pretrain", False), (None, False)):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        part.parent.mkdir(parents=True)
        part.write_bytes(b"segments")
        if phase is not None:
            (tmp_path / "run" / "config.yaml").write_text(cfg.dump())
            commit(begin(tmp_path / "run" / "checkpoints"), {"phase": phase, "env_steps": 0, "updates": 9}, 2)
        with RunFolder(cfg) as folder:
            assert part.exists() is stays
            kept = list(folder.path.glob("set_aside_journal_*/replay/part_000000"))
        assert [p.read_bytes() for p in kept] == ([] if stays else [b"segments"])
        assert ("the run begins that anew" in capsys.readouterr().err) is not stays


def test_a_folder_that_was_refused_is_free_again(tmp_path, data):
    """As in a notebook, which keeps the exception, and with it whatever was at work."""
    run = tmp_path / "run"
    with RunFolder(small(run, data)):
        (run / "offline").mkdir()
    with pytest.raises(ConfigError) as kept:
        RunFolder(small(run, data, critic__gamma=0.5))
    with RunFolder(small(run, data)):
        assert is_open(run)
    assert not is_open(run) and kept is not None


def test_own_environment_class_and_hook(tmp_path, data):
    seen = []

    def hook(segment):
        seen.append(segment)
        return segment
    summary = train(small(tmp_path / "run", data, serial=True, online__env_steps=60, eval__every_steps=0, task__env="HalfCheetah-v4"), Mine, hook)
    assert sum(len(s) for s in seen) >= 60
    policy = load(tmp_path / "run")
    assert summary["env_id"] == policy.cfg.task.env == "tests.e2e.test_run:Mine" and isinstance(policy.make_env().unwrapped, Mine)
    assert "observation (4,) -> action (2,) of tests.e2e.test_run:Mine" in repr(policy)

    class Local(Mine):
        pass
    with pytest.raises(ConfigError, match="task.env.*has no .*Local.*belongs into a module"):       # not another environment in its place
        env_factory(policy.cfg.replace({"task.env": callable_name(Local)}).task)


def test_a_run_that_never_had_data_takes_other_settings(tmp_path, data):
    with pytest.raises(DataError, match="no such file"):
        train(small(tmp_path / "run", tmp_path / "mistyped.hdf5", serial=True))
    cfg = small(tmp_path / "run", data, serial=True, online__env_steps=60, eval__every_steps=0, pretrain__updates=5, pretrain__policy_updates=5)
    assert train(cfg)["env_steps"] >= 60
    with pytest.raises(ConfigError, match="was started with other settings"):
        train(cfg.replace({"data.source": str(tmp_path / "mistyped.hdf5")}))


def test_the_command_that_resumes_can_be_pasted(monkeypatch):
    for argv, line in ((["/x/modip_ray/__main__.py", "train", "a=b c"], "python -m modip_ray train 'a=b c'"), (["/venv/bin/modip", "train"], "modip train"),
                       (["/my scripts/pm.py"], "python '/my scripts/pm.py'")):
        monkeypatch.setattr(sys, "argv", argv)
        assert command_line() == line


@pytest.mark.parametrize(("broken", "words"), [
    ({"reset": lambda self, seed=None, options=None: np.zeros(4, np.float32)}, "task.env.*reset"),
    ({"reset": lambda self: (np.zeros(4, np.float32), {})}, "reset.seed=0. failed with TypeError"),
    ({"step": lambda self, a: (self.state, float("nan"), False, False, {})}, "reward nan; both must be finite"),
    ({"step": lambda self, a: (self.state, 0.0, False, {})}, "step failed with ValueError"),
    ({"__init__": lambda self: 1 / 0}, "cannot be made, ZeroDivisionError"),
    ({"action_space": gym.spaces.Discrete(3)}, "action_space must be a Box.*act in boxes only"),
])
def test_an_environment_that_does_not_work_is_told_before_anything_is_trained(tmp_path, data, broken, words):
    made = type("Broken", (PointEnv,), broken)
    with pytest.raises((EnvError, ConfigError), match=words):
        train(small(tmp_path / "run", data, serial=True, pretrain__updates=10**6), made)


def test_a_device_that_no_role_would_use_is_refused(tmp_path, data):
    with pytest.raises(ConfigError, match="resources.device: got 'cuda', but no role has a GPU"):
        train(small(tmp_path / "run", data, resources__device="cuda"))


def test_commands_look_at_what_they_will_write_first(tmp_path, capsys):
    there = tmp_path / "there.hdf5"
    there.write_bytes(b"kept")
    for args, words in ((["collect", "--policy", "demonstrator", "--transitions", "10", "--out", str(there)], "is there already"),
                        (["collect", "--policy", "demonstrator", "--transitions", "10", "--out", str(tmp_path)], "is a folder"),
                        (["eval", str(tmp_path), "--json", str(there / "x.json")], f"cannot be written, {there} is no folder"),
                        (["export", str(tmp_path), "--to", "onnx", "--out", str(tmp_path)], "is a folder")):
        with pytest.raises(SystemExit) as ended:
            main(args)
        assert ended.value.code == 2 and words in capsys.readouterr().err
    assert there.read_bytes() == b"kept"


def test_a_file_in_a_runs_place_and_a_damaged_summary_are_named(tmp_path, capsys):
    file, run = tmp_path / "file", tmp_path / "run"
    file.write_text("x")
    run.mkdir()
    (run / "summary.json").write_text("[1, 2]")
    for args, words in ((["eval", str(file)], "is a file; expected a run folder"), (["export", str(file), "--to", "onnx"], "expected a run folder")):
        with pytest.raises(SystemExit) as ended:
            main(args)
        assert ended.value.code == 2 and words in capsys.readouterr().err
    with pytest.raises(RunError, match="is not what a run writes"):
        read_summary(run)


def test_without_periodic_evaluations_there_is_no_best_checkpoint(finished_run):
    """The final evaluation is of other weights than those at the end of pre-training."""
    assert not list((finished_run / "checkpoints").glob("best_*"))


class Mine(PointEnv):
    """An environment of one's own, handed over as a class."""


@pytest.mark.parametrize("network", ["mlp", "unet"])
def test_any_gymnasium_id_with_a_minari_dataset(tmp_path, monkeypatch, network):
    """Made with Minari's own API; actions in the environment's own range, [-2, 2]."""
    minari = pytest.importorskip("minari")
    from minari.data_collector import EpisodeBuffer
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    rng = np.random.default_rng(0)
    buffers = [EpisodeBuffer(id=i, observations=rng.normal(size=(21, 3)).astype(np.float32), actions=rng.uniform(-2, 2, (20, 1)).astype(np.float32),
                             rewards=rng.normal(size=20), terminations=[False] * 20, truncations=[False] * 19 + [True]) for i in range(10)]
    minari.create_dataset_from_buffers("pendulum/test-v0", buffers, env="Pendulum-v1")
    summary = train(small(tmp_path / "run", serial=True, online__env_steps=60, eval__every_steps=0, task__env="Pendulum-v1", task__max_episode_steps=20,
                          data__source="minari:pendulum/test-v0", policy__network=network))
    assert summary["scores"]["data"]["episodes"] == 10 and summary["env_steps"] >= 60
    assert all(np.isfinite(s["returns"]).all() for s in summary["scores"].values())


def test_mistakes_are_told_in_one_line(tmp_path):
    for args, words in ((("train", "planer.horizon=3"), "planner"), (("train", "task=hoper-medium"), "hopper-medium"), (("eval", str(tmp_path)), "config.yaml"),
                        (("data", "info", str(tmp_path / "x.hdf5")), "no such file"), (("train", "task.env=Nope-v0", f"run_dir={tmp_path / 'r'}"), "task.env")):
        done = modip(*args)
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr, (args, done.stderr)
        assert len([line for line in done.stderr.splitlines() if line.startswith("modip ")]) == 1
