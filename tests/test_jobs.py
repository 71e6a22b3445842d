"""`modip submit` and `modip jobs` against a real head with token authentication, and their parts by themselves."""

import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from zipfile import ZipFile

import pytest

from cluster.local import LocalCluster
from modip_ray.cli import parsed
from modip_ray.cli.submitted import check_name, on_cluster, prepare, shell_word, submission
from modip_ray.config import ConfigError
from modip_ray.jobs import client as jobs
from modip_ray.jobs import fetch as fetch_module
from modip_ray.jobs import send as jobs_send
from modip_ray.jobs.client import JobError
from modip_ray.jobs.fetch import MARK, Receiver, check_target, replace, unpack
from modip_ray.jobs.package import write_package
from modip_ray.learning.checkpoint import newest
from modip_ray.report.metrics import read_metrics
from modip_ray.runfolder import LOCK
from tests.fakes import SMALL, write_data

ROOT = Path(__file__).resolve().parents[1]
TINY = SMALL | {"task.env": "points:PointEnv", "data.source": "data.hdf5", "pretrain.updates": 10, "pretrain.policy_updates": 10, "online.env_steps": 60,
                "eval.every_steps": 0, "eval.episodes": 2, "rollout.num_workers": 1}

SLOW = """
import time


class SlowEnv(PointEnv):
    def step(self, action):
        time.sleep(0.2)
        return super().step(action)
"""


def words(**dotted) -> list[str]:
    settings = TINY | {k.replace("__", "."): v for k, v in dotted.items()}
    return [f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in settings.items()]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A user's folder far from the checkout: an environment of theirs, data, and things that must not travel."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "points.py").write_text((ROOT / "tests" / "fakes.py").read_text() + SLOW)
    write_data(folder / "data.hdf5", 600)
    (folder / "runs" / "other").mkdir(parents=True)
    (folder / "runs" / "other" / "x.bin").write_bytes(b"x")
    (folder / ".secret").write_text("s")
    (folder / "__pycache__").mkdir()
    with open(folder / "large.hdf5", "wb") as file:
        file.truncate(51_000_000)
    return folder


# ---- with a cluster ----------------------------------------------------------------------------------------------------------------------------


class Head:
    def __init__(self, cluster: LocalCluster, work: Path):
        self.cluster, self.work, self.storage = cluster, work, cluster.state.with_name(cluster.state.name + "_runs")
        clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        self.env = clean | cluster.client_environment() | {"OMP_NUM_THREADS": "1"}

    def command(self, *args: str) -> list[str]:
        return [sys.executable, "-m", "modip_ray", *args]

    def modip(self, *args: str, env: dict | None = None) -> subprocess.CompletedProcess:
        return subprocess.run(self.command(*args), cwd=self.work, env=self.env | (env or {}), capture_output=True, text=True, timeout=900)

    def submit(self, run_dir: str, *options: str, **dotted) -> subprocess.CompletedProcess:
        return self.modip("submit", "--storage", str(self.storage), *options, "--", "train", *words(**dotted), f"run_dir={run_dir}")


@pytest.fixture(scope="module")
def head(work):
    state = Path(tempfile.mkdtemp(prefix="mj", dir="/tmp"))                     # sockets need a short path
    with LocalCluster(state).up(head={"CPU": 3.0, "trainer": 1.0}) as cluster:
        found = Head(cluster, work)
        yield found
        shutil.rmtree(found.storage, ignore_errors=True)


def files(folder: Path) -> dict[str, bytes]:
    """Less the offline rows, which are made anew from the data and do not travel."""
    found = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".") and p.name != MARK}
    return {name: p.read_bytes() for name, p in found.items() if not name.startswith("offline/")}


@pytest.mark.ray
def test_a_submitted_run_is_followed_and_its_folder_comes_back(head):
    """A serial one, as what a job sends back is the same; the next test's has its roles on the cluster."""
    done = head.submit("runs/one", serial=True)
    assert done.returncode == 0, done.stderr
    assert "pretrain: 20 updates" in done.stdout and "MPC" in done.stdout, "its own progress lines"
    assert "left out, over 50 MB: large.hdf5" in done.stderr
    here, there = head.work / "runs" / "one", head.storage / "runs" / "one"
    assert json.loads((here / "summary.json").read_text())["env_steps"] >= 60
    assert files(here) == files(there) and newest(here / "checkpoints") is not None
    assert (here / "report" / "index.html").is_file()
    listed = head.modip("jobs", "list").stdout.splitlines()
    assert listed[0].split() == ["id", "name", "status", "started", "duration", "entrypoint"]
    assert [line.split()[1:3] for line in listed[1:]] == [["one", "SUCCEEDED"]]
    assert listed[0].index("status") == listed[1].index("SUCCEEDED"), "aligned"


@pytest.mark.ray
def test_ctrl_c_detaches_and_cancel_saves(head):
    started = head.submit("runs/long", "--no-wait", task__env="points:SlowEnv", online__env_steps=100_000)
    assert started.returncode == 0 and "modip jobs follow long-" in started.stderr
    follower = subprocess.Popen(head.command("jobs", "follow", "long"), cwd=head.work, env=head.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    seen = []
    while not any(line.startswith("pretrain:") for line in seen):
        seen.append(follower.stdout.readline())
        assert seen[-1], "".join(seen) + follower.stderr.read()
    follower.send_signal(signal.SIGINT)
    _, told = follower.communicate(timeout=240)
    assert follower.returncode == 130 and "goes on" in told and "Traceback" not in told
    fetched = head.modip("jobs", "fetch", "long", "--without-checkpoints", "--to", "copy")
    assert fetched.returncode == 0 and (head.work / "copy" / "config.yaml").is_file(), fetched.stderr
    deadline = time.monotonic() + 240
    while not any(row.get("env_steps", 0) > 0 for row in read_metrics(head.storage / "runs" / "long")):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    cancelled = head.modip("jobs", "cancel", "long")
    told = re.search(r"STOPPED; stopped at [\d,]+ environment steps.*with a checkpoint", cancelled.stdout)
    assert cancelled.returncode == 0 and told, cancelled.stdout
    assert newest(head.storage / "runs" / "long" / "checkpoints").counters["env_steps"] > 0
    assert head.modip("jobs", "cancel", "long").stdout.strip().endswith("is STOPPED already")
    assert not list(head.work.glob(".copy-*")), "nothing half fetched is left"


@pytest.mark.ray
def test_what_goes_wrong_on_the_cluster_ends_with_its_own_line(head):
    lacking = head.submit("runs/gpu", resources__planner_gpus=4)
    assert lacking.returncode == 2 and "resources.planner_gpus=4" in lacking.stdout and "Traceback" not in lacking.stdout + lacking.stderr
    failed = head.submit("runs/none", "--python", "no-such-python")
    assert failed.returncode == 1 and "no-such-python" in failed.stdout and "FAILED (exit code 127)" in failed.stderr
    assert "no run folder: " in failed.stderr and not (head.work / "runs" / "none").exists()


@pytest.mark.ray
def test_tokens_and_addresses_are_told_in_one_line(head, tmp_path):
    wrong = tmp_path / "wrong"
    wrong.write_text("0" * 64)
    token = (head.cluster.state / "token").read_text()
    cases = [({"RAY_AUTH_TOKEN_PATH": str(wrong)}, "the token is not the one of this cluster"),
             ({"RAY_AUTH_MODE": "disabled"}, "asks for a token"),
             ({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "none")}, "asks for a token"),
             ({"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:1"}, "no answer (connection refused)")]
    for changed, told in cases:
        done = head.modip("submit", "--", "train", *words(run_dir="runs/x"), env=changed)
        assert done.returncode == 2 and told in done.stderr and len(done.stderr.splitlines()) == 1, (changed, done.stderr)
        assert token not in done.stderr + done.stdout
    given = head.modip("jobs", "follow", "lonk", "--address", head.env["RAY_API_SERVER_ADDRESS"], env={"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:1"})
    assert given.returncode == 2 and "'modip jobs list'" in given.stderr, "--address wins, and the job is unknown there"


# ---- without one -------------------------------------------------------------------------------------------------------------------------------


def test_a_server_that_never_answers_is_given_up(monkeypatch):
    monkeypatch.setattr(jobs, "ANSWER_S", 0.5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(JobError, match=r"no answer \(timed out\)"):
            jobs.connect(f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert jobs.ADDRESS not in os.environ


@pytest.mark.parametrize(("given", "told"), [("ray://head:10001", "http://head:8265"), ("head:6379", "http://head:8265"), ("auto", "http://HEAD:8265"),
                                             (None, "--address http://HEAD:8265")])
def test_addresses_of_another_kind_are_corrected(given, told, monkeypatch):
    monkeypatch.delenv(jobs.ADDRESS, raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(JobError, match=told):
        jobs.find_address(given)


def test_the_package_holds_the_folder_and_modip_ray_alone_suffices(work, tmp_path):
    archive = tmp_path / "p.zip"
    assert write_package(work, archive) == ["large.hdf5 (51.0 MB)"]
    ZipFile(archive).extractall(tmp_path / "there")
    names = set(ZipFile(archive).namelist())
    assert {"points.py", "data.hdf5", "modip_ray/cli/__init__.py", "modip_ray/configs/default.yaml", "modip_ray/configs/tasks/hopper-medium.yaml"} <= names
    assert not any(name.startswith(("runs/", ".")) or "__pycache__" in name or name == "large.hdf5" for name in names)
    code = "import modip_ray, modip_ray.config as c; print(modip_ray.__file__, c.config_dir()); c.load('demo')"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "there", env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and all(str(tmp_path / "there") in path for path in done.stdout.split()), done.stdout + done.stderr


def test_a_checkout_is_packaged_once(tmp_path):
    write_package(ROOT, tmp_path / "p.zip")
    names = ZipFile(tmp_path / "p.zip").namelist()
    assert len(names) == len(set(names)) and "modip_ray/cli/__init__.py" in names and "tests/fakes.py" in names
    assert not any(name.startswith((".git", ".venv", "runs/", "results/")) for name in names)


def test_a_folder_that_is_too_large_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("modip_ray.jobs.package.PACKAGE_BYTES", 10_000)
    for k in range(5):
        (tmp_path / f"{k}.bin").write_bytes(os.urandom(9_000))
    with pytest.raises(JobError, match="more than a job can take along"):
        write_package(tmp_path, tmp_path.parent / "p.zip")


def test_commands_for_the_cluster(tmp_path):
    train = prepare(["train", "--config", "demo", "run_dir=runs/d", "planner.horizon=2"], None, "~/s", tmp_path)
    assert train.arguments == ["train", "--config", "demo", "planner.horizon=2", "run_dir=~/s/runs/d", "resources.ray_address=auto"]
    assert (train.label, train.run_dir, train.local_dir) == ("d", "~/s/runs/d", "runs/d")
    named = prepare(["train", "resources.ray_address=local"], "n1", "/s", tmp_path)
    assert named.arguments == ["train", "resources.ray_address=local", "run_dir=/s/runs/n1"] and named.label == "n1"
    addressed = prepare(["train", "--config", "cluster"], "n2", "/s", tmp_path)
    assert addressed.arguments == ["train", "run_dir=/s/runs/n2", "--config", "cluster"], "the file has the address"
    first = prepare(["train", "run_dir=runs/d", "seed=1", "--config", "demo"], None, "/s", tmp_path)
    assert first.arguments == ["train", "seed=1", "run_dir=/s/runs/d", "resources.ray_address=auto", "--config", "demo"]
    around = prepare(["train", "seed=1", "--config", "demo", "run_dir=runs/d", "planner.horizon=2"], None, "/s", tmp_path)
    assert around.arguments == ["train", "seed=1", "--config", "demo", "planner.horizon=2", "run_dir=/s/runs/d", "resources.ray_address=auto"]
    absolute = prepare(["train", "run_dir=/data/r1"], None, "/s", tmp_path)
    assert (absolute.run_dir, absolute.local_dir) == ("/data/r1", "runs/r1")
    unnamed = prepare(["train", "task=hopper-medium"], None, "/s", tmp_path)
    assert unnamed.run_dir == f"/s/runs/{unnamed.label}" and unnamed.label.startswith("hopper-medium-2")
    search = prepare(["tune", "tiny", "out=runs/tune/x", "num_samples=2"], None, "~/s", tmp_path)
    assert search.arguments == ["tune", "tiny", "num_samples=2", "out=~/s/runs/tune/x", "ray_address=auto"] and search.local_dir == "runs/tune/x"
    (tmp_path / "s.yaml").write_text("{task: hopper-medium, start: runs/base, search: {guard.trust: {uniform: [0, 1]}}}")
    assert "start=~/s/runs/base" in prepare(["tune", "s.yaml"], None, "~/s", tmp_path).arguments, "of the file"
    started = prepare(["train", "pretrain.start=runs/base", "run_dir=runs/d"], None, "~/s", tmp_path)
    assert started.arguments == ["train", "pretrain.start=~/s/runs/base", "run_dir=~/s/runs/d", "resources.ray_address=auto"]
    compared = prepare(["study", "main", "out=runs/s", "seeds=[0]"], None, "~/s", tmp_path)
    assert compared.arguments == ["study", "main", "seeds=[0]", "out=~/s/runs/s"] and (compared.run_dir, compared.local_dir) == ("~/s/runs/s", "runs/s")
    measured = prepare(["eval", "runs/d", "--mode", "all", "--json", "runs/d/e.json"], None, "~/s", tmp_path)
    assert measured.arguments == ["eval", "~/s/runs/d", "--mode", "all", "--json", "~/s/runs/d/e.json"] and measured.local_dir == "runs/d"
    joined = prepare(["eval", "runs/d", "--json=e.json", "--mode=all"], None, "~/s", tmp_path)
    assert joined.arguments == ["eval", "~/s/runs/d", "--json=~/s/e.json", "--mode=all"]
    rolled = prepare(["collect", "--policy", "p.hdf5", "--transitions", "9", "--out", "d/o.hdf5"], None, "~/s", tmp_path)
    assert rolled.arguments == ["collect", "--policy", "~/s/p.hdf5", "--transitions", "9", "--out", "~/s/d/o.hdf5"], "no file here: a run folder there"
    for travels, policy in ((True, "p.hdf5"), (True, "./d/p.hdf5"), (False, "runs/p.hdf5"), (False, "d/.p.hdf5"), (False, "d/large.hdf5")):
        (tmp_path / policy).parent.mkdir(exist_ok=True)
        with open(tmp_path / policy, "wb") as file:
            file.truncate(51_000_000 if "large" in policy else 1)
        rolled = prepare(["collect", f"--policy={policy}", "--transitions=9", "--out", "d/o.hdf5"], None, "~/s", tmp_path)
        assert rolled.arguments == ["collect", f"--policy={policy if travels else f'~/s/{policy}'}", "--transitions=9", "--out", "~/s/d/o.hdf5"]
    for command in (train, named, around, absolute, first, search, started, compared, measured, joined):
        assert parsed(command.arguments), "it can be read where it is to run"
    both = prepare(["report", "runs/a", "runs/b"], None, "~/s", tmp_path)
    assert both.arguments == ["report", "~/s/runs/a", "~/s/runs/b"] and both.run_dir is None
    entry = submission(train, "python3", tmp_path / "p.zip").entrypoint
    assert entry.startswith("exec python3 -m modip_ray train") and 'run_dir="$HOME"/s/runs/d' in entry
    echoed = subprocess.run(["sh", "-c", f"echo {shell_word('run_dir=~/a b')} {shell_word('~/c')} {shell_word('x=$(id)')}"], env={"HOME": "/h"},
                            capture_output=True, text=True).stdout
    assert echoed == "run_dir=/h/a b /h/c x=$(id)\n"
    assert on_cluster("runs/x/", "~/s/") == "~/s/runs/x"


@pytest.mark.parametrize(("arguments", "error", "told"), [([], JobError, "behind --"), (["jobs", "list"], JobError, "cannot be submitted"),
                                                          (["train", "planer.horizon=3"], ConfigError, "planner"),
                                                          (["train", "--config", "nope"], ConfigError, "nope")])
def test_mistakes_are_found_before_anything_is_sent(arguments, error, told, tmp_path):
    with pytest.raises(error, match=told):
        prepare(arguments, None, "~/s", tmp_path)
    with pytest.raises(ConfigError, match="letters, digits"):
        check_name("../x")


def sent(folder: Path, checkpoints: bool = True) -> str:
    out = io.StringIO()
    jobs_send.send(folder, checkpoints, out)
    return out.getvalue()


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    for name, text in {"config.yaml": "a: 1", "checkpoints/step_1/done": "", "checkpoints/step_2/part.npz": "half", "report/index.html": "x" * 200_000,
                       "journal/replay/part_0000001": "acknowledged", ".lock": ""}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "checkpoints" / "step_1" / "replay.npz").write_bytes(os.urandom(200_000))
    return folder


def received(tmp_path: Path, text: str, piece: int = 7_001) -> Receiver:
    receiver = Receiver(tmp_path / "r.tar.gz")
    for start in range(0, len(text), piece):
        receiver.take(text[start:start + piece])
    return receiver


def test_a_folder_survives_the_log_whole(run, tmp_path):
    text = "Running entrypoint for job x\n" + sent(run)
    assert max(map(len, text.splitlines())) < 100_000
    receiver = received(tmp_path, text)
    assert receiver.complete and receiver.failed is None
    unpack(receiver.path, tmp_path / "back")
    assert files(tmp_path / "back") == {k: v for k, v in files(run).items() if "step_2" not in k}, "a checkpoint without its mark is none"
    small = received(tmp_path, sent(run, checkpoints=False))
    unpack(small.path, tmp_path / "small")
    assert set(files(tmp_path / "small")) == {"config.yaml", "report/index.html"}


def test_a_checkpoint_that_the_run_drops_meanwhile_arrives_whole_with_the_journal_after_it(run, tmp_path, monkeypatch):
    """Removed when the first file is on its way."""
    line = jobs_send.Lines.line

    def dropped(self, size):
        for name in ("checkpoints", "journal"):
            shutil.rmtree(run / name, ignore_errors=True)
        line(self, size)
    monkeypatch.setattr(jobs_send.Lines, "line", dropped)
    whole = {k: v for k, v in files(run).items() if "step_2" not in k}
    unpack(received(tmp_path, sent(run)).path, tmp_path / "back")
    assert files(tmp_path / "back") == whole and {"checkpoints/step_1/replay.npz", "journal/replay/part_0000001"} <= set(whole)


def test_damage_on_the_way_is_noticed(run, tmp_path):
    text = sent(run)
    lines = text.splitlines(keepends=True)
    job = type("Job", (), {"message": "", "status": jobs.JobStatus.RUNNING})
    for damaged in ("".join(lines[1:]), "".join(lines[:-1]), text.replace(lines[1][20:24], "AAAA", 1)):
        receiver = received(tmp_path, damaged)
        assert not receiver.complete
        with pytest.raises(JobError, match="did not arrive whole"):
            receiver.check(job, "r")
    with pytest.raises(JobError, match="damaged"):
        received(tmp_path, text.replace(lines[1][20:24], "*?*?", 1))


def test_nothing_is_unpacked_outside_the_folder(tmp_path):
    for name, kind in (("../evil", tarfile.REGTYPE), ("link", tarfile.SYMTYPE)):
        archive = tmp_path / "bad.tar.gz"
        with tarfile.open(archive, "w:gz") as tar:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        with pytest.raises(JobError, match="cannot be unpacked"):
            unpack(archive, tmp_path / f"out-{info.name.strip('./')}")
    assert not (tmp_path / "evil").exists()


def test_only_an_earlier_copy_is_replaced(tmp_path):
    target, new = tmp_path / "runs" / "r", tmp_path / "t" / "run"
    for folder in (target, new):
        folder.mkdir(parents=True)
    (target / "mine").write_text("1")
    with pytest.raises(JobError, match="exists here"):
        check_target(target)
    (target / MARK).write_text("{}")
    check_target(target)
    (target / LOCK).touch()
    with pytest.raises(JobError, match="trained further here"):
        check_target(target)
    (target / LOCK).unlink()
    (new / "theirs").write_text("2")
    replace(new, target)
    assert [p.name for p in target.iterdir()] == ["theirs"]


@pytest.fixture
def cluster(monkeypatch):
    """The run folders of a cluster that is not there: name -> {file: text}."""
    runs = {}

    def start(client, job_id, run_dir, python, checkpoints, folder, received):
        for name, text in runs[run_dir].items():
            (folder / "sent" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "sent" / name).write_text(text)
        received.take(sent(folder / "sent"))
    monkeypatch.setattr(fetch_module, "start", start)
    monkeypatch.setattr(fetch_module, "end", lambda client, job_id: None)
    client = type("Client", (), {"get_address": lambda self: "http://head:8265"})()
    return runs, lambda run_dir, target: fetch_module.fetch(client, run_dir, target, "python")


def test_what_was_made_in_a_copy_outlives_the_next_fetch(cluster, tmp_path):
    (runs, fetch), copy = cluster, tmp_path / "runs" / "r"
    runs["~/r"] = {"config.yaml": "1", "summary.json": "old", "report/index.html": "theirs"}
    fetch("~/r", copy)
    for name in ("export/policy.onnx", "report/comparison.html", "report/index.html", "scores.json"):
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text("mine")
    (copy / "export" / "newest").symlink_to("policy.onnx")
    runs["~/r"] = {"config.yaml": "2", "report/index.html": "newer"}
    for _ in range(2):
        fetch("~/r", copy)
        assert files(copy) == {"config.yaml": b"2", "report/index.html": b"newer", "export/policy.onnx": b"mine", "export/newest": b"mine",
                               "report/comparison.html": b"mine", "scores.json": b"mine"}, "what the run itself has dropped is gone"
    assert (copy / "export" / "newest").is_symlink()
    mark = json.loads((copy / MARK).read_text())
    (copy / MARK).write_text(json.dumps({k: v for k, v in mark.items() if k != "files"}))
    fetch("~/r", copy)
    assert set(files(copy)) == {"config.yaml", "report/index.html", "report/comparison.html", "export/policy.onnx", "export/newest"}, "an older version's mark"


def test_a_copy_of_another_run_in_which_something_was_made_is_refused(cluster, tmp_path):
    (runs, fetch), copy = cluster, tmp_path / "copy"
    runs |= {"~/a": {"config.yaml": "a"}, "~/b": {"config.yaml": "b"}}
    fetch("~/a", copy)
    fetch("~/b", copy)
    (copy / "mine.txt").write_text("1")
    with pytest.raises(JobError, match=r"is a copy of ~/b, not of ~/a, and holds what was made in it here \(mine.txt\)"):
        fetch("~/a", copy)
    assert (copy / "mine.txt").read_text() == "1" and (copy / "config.yaml").read_text() == "b"
