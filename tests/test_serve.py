"""`modip serve`: one real server for all tests over HTTP, ended by Ctrl-C in the last one; the engine and the checks as plain objects."""

import asyncio
import http.client
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import psutil
import pytest

from modip_ray import cli
from modip_ray.bench import serve as bench_serve
from modip_ray.learning.checkpoint import folders
from modip_ray.policy import load
from modip_ray.serve import engine as engine_module
from modip_ray.serve.app import Server
from modip_ray.serve.bad_requests import generate, send
from modip_ray.serve.client import PolicyClient, RefusedError
from modip_ray.serve.engine import Engine
from modip_ray.serve.query import Query

pytestmark = pytest.mark.ray
ROOT = Path(__file__).resolve().parents[1]
ROWS = np.random.default_rng(0).standard_normal((5, 4), np.float32)


class Served:
    """`modip serve RUN` in a process group of its own, on a copy of the run."""

    def __init__(self, run: Path, folder: Path):
        self.run, self.log = shutil.copytree(run, folder / "run"), folder / "log"
        args = [sys.executable, "-m", "modip_ray", "serve", str(self.run), "--port", "0", "--follow", "0.2", "--set", "planner.max_wait_ms=100"]
        self.process = subprocess.Popen(args, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=self.log.open("w"), stderr=subprocess.STDOUT,
                                        start_new_session=True)
        self.url = self.wait_for(r"at (http://127\.0\.0\.1:\d+) ")

    def wait_for(self, pattern: str) -> str:
        deadline = time.monotonic() + 240
        while (found := re.search(pattern, self.log.read_text())) is None:
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)
        return found[1]

    def processes(self) -> list[psutil.Process]:
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]


@pytest.fixture(scope="module")
def server(finished_run, tmp_path_factory):
    served = Served(finished_run, tmp_path_factory.mktemp("serve"))
    with PolicyClient(served.url) as client:
        served.first = client.act(ROWS)
    yield served
    if served.process.poll() is None:                       # the last test was not asked for, or failed
        served.process.send_signal(signal.SIGINT)
        served.process.wait(240)


def queries(*sizes: int, mode: str = "policy", clients: tuple = ()) -> list[Query]:
    rng = np.random.default_rng(1)
    names = clients or (None,) * len(sizes)
    return [Query(rng.standard_normal((n, 4), np.float32), np.zeros(n, bool), name, mode) for n, name in zip(sizes, names, strict=True)]


def test_the_actions_are_those_of_the_policy(server, finished_run):
    """Of a fresh server's first request, as both draw the same noise; and JSON takes and gives what float32 does."""
    np.testing.assert_array_equal(server.first, load(finished_run).chunks(ROWS, range(5), np.ones(5, bool)))
    for as_json in (False, True):
        with PolicyClient(server.url, as_json=as_json) as client:
            assert client.act(ROWS).shape == (5, 2, 2) and client.act(ROWS[0], reset=True).shape == (2, 2)
            assert client.act(ROWS, reset=np.array([1, 0, 0, 1, 0], bool)).dtype == np.float32
            assert np.abs(client.act(100 * ROWS)).max() <= 1
            info = client.info()
            assert client.version == info["version"] == folders(server.run / "checkpoints")[0].name
    assert info["run"] == str(server.run) and info["mode"] == "policy" and info["obs_dim"] == 4 and info["chunk"] == {"policy": 2, "mpc": 1}


def test_the_planner_answers_too(server):
    with PolicyClient(server.url, client="robot", mode="mpc") as client:
        assert client.act(ROWS, reset=True).shape == (5, 1, 2) and client.act(ROWS).shape == (5, 1, 2)


def test_whoever_asks_at_once_shares_a_batch(server):
    with PolicyClient(server.url) as client:
        before = client.info()["served"]
        case = bench_serve.Case("policy", "policy", rows=2)
        found = {r.name: r for r in bench_serve.case_rows(server.url, case, 16, 1.0, load(server.run))}
        after = client.info()["served"]
    rows, batches = (after[k] - before[k] for k in ("rows", "batches"))
    assert rows > 16 * 2 * bench_serve.WARM_UP and rows / batches > 8
    assert found["serve.policy.actions_per_s"].value > 10 and found["serve.policy.p95_ms"].value >= found["serve.policy.p50_ms"].value > 0


def test_a_thousand_bad_requests_are_refused_and_the_server_lives(server):
    with PolicyClient(server.url) as client:
        refused, wrong = send(server.url, generate(1000, client.info()))
        assert not wrong and sum(refused.values()) == 1000 and len(refused) > 50
        with pytest.raises(RefusedError, match=r"^422: observation: got 3 numbers in row 0, allowed \(4,\) or \(rows, 4\) with 1 to 512 rows; send"):
            PolicyClient(server.url, as_json=True).act(ROWS[0, :3])
        with pytest.raises(RefusedError, match="413: .*got 600 rows"):
            client.act(np.zeros((600, 4)))
        with pytest.raises(ValueError, match=r"^obs: got shape \(4, 5\), expected \(4,\) or \(rows, 4\); send one"):
            client.act(ROWS.T)
        assert client.act(ROWS).shape == (5, 2, 2)


def test_what_is_no_http_or_ends_early_harms_nobody(server):
    address = urlsplit(server.url)
    for sent in (b"\0\1\2\3\r\n\r\n", b"POST /act HTTP/1.1\r\nContent-Length: -5\r\n\r\n", b"POST /act HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\nabc",
                 b"POST /act HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", b"GET / HTTP/1.1\r\nX: " + b"x" * 200_000):
        with socket.create_connection((address.hostname, address.port), 10) as line:
            line.sendall(sent)
    with PolicyClient(server.url) as client:
        assert client.act(ROWS).shape == (5, 2, 2)


def test_only_this_machine_can_reach_it(server):
    listening = {c.laddr.ip.removeprefix("::ffff:") for p in server.processes() for c in p.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    assert listening - {"::1"} == {"127.0.0.1"}


def test_a_newer_checkpoint_acts(server):
    newest = folders(server.run / "checkpoints")[0]
    partial = shutil.copytree(newest, newest.with_name(".copy"))
    later = partial.rename(newest.with_name("step_000000999_u0000999"))
    deadline = time.monotonic() + 240
    with PolicyClient(server.url) as client:
        while client.act(ROWS).shape == (5, 2, 2) and client.version != later.name:
            assert time.monotonic() < deadline, client.info()
            time.sleep(0.05)


@pytest.mark.parametrize("last", ["", "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"])
def test_a_client_whose_server_was_away_asks_it_again_as_if_nothing_had_been(last):
    """It closes the connection and is gone, or it ends in the middle of an answer; then there is one at that address again."""
    listener, answer = socket.create_server(("127.0.0.1", 0)), 'HTTP/1.1 200 OK\r\nContent-Length: 14\r\n\r\n{"obs_dim": 4}'
    address = listener.getsockname()

    def serve(listener, answers):
        connection, _ = listener.accept()
        listener.close()
        for text in answers:
            connection.recv(2**16)
            connection.sendall(text.encode())
        connection.close()

    def started(listener, answers):
        thread = threading.Thread(target=serve, args=(listener, answers), daemon=True)
        thread.start()
        return thread
    serving = started(listener, [answer, *([last] if last else [])])
    with PolicyClient(f"http://127.0.0.1:{address[1]}", timeout_s=60.0) as client:
        assert client.info() == {"obs_dim": 4}
        if not last:
            serving.join(10)
        with pytest.raises((OSError, http.client.HTTPException)):
            client.info()
        serving.join(10)
        started(socket.create_server(address), [answer])
        assert client.info() == {"obs_dim": 4}


def test_bytes_of_another_shape_are_not_sent_as_other_rows(monkeypatch):
    sent = []

    def request(self, method, path, body=None, content_type=None):
        sent.append(method)
        return (b'{"obs_dim": 4}', {}) if method == "GET" else (body, {"x-version": "v", "x-shape": f"{len(body) // 16},2,2"})
    monkeypatch.setattr(PolicyClient, "request", request)
    client = PolicyClient("http://localhost:1")
    for wrong in (ROWS.T, ROWS.ravel(), ROWS[None], ROWS[0, 0], ROWS[:, :2], np.zeros(0)):
        with pytest.raises(ValueError, match=r"expected \(4,\) or \(rows, 4\)"):
            client.act(wrong)
    assert client.act(ROWS).shape == (5, 2, 2) and client.act(ROWS[0]).shape == (2, 2) and sent == ["GET", "POST", "POST"]


def test_each_query_of_a_batch_gets_its_own_rows(finished_run):
    asked = queries(1, 3, 2)
    alone = load(finished_run).chunks(np.concatenate([q.obs for q in asked]), range(6), np.ones(6, bool))
    served = Engine(finished_run, "policy")(asked)
    np.testing.assert_array_equal(np.concatenate([a.actions for a in served]), alone)
    mixed = Engine(finished_run, "mpc")([*queries(2, mode="mpc"), *asked, *queries(1, mode="mpc")])
    assert [a.actions.shape for a in mixed] == [(2, 1, 2), (1, 2, 2), (3, 2, 2), (2, 2, 2), (1, 1, 2)]
    assert Engine(finished_run, "bc").limits.modes == ("bc",)


@pytest.fixture
def planned(finished_run, monkeypatch):
    """An engine, and which rows of its plans began warm."""
    engine, begins = Engine(finished_run, "mpc"), []
    plan = engine.policy.planner.search.__call__
    monkeypatch.setattr(engine.policy.planner, "find", lambda s, noise, warm, has_warm, limits: begins.append(has_warm.tolist()) or
                        plan(s, noise, warm, has_warm, limits))
    return engine, begins


def test_named_clients_plan_from_their_last_plans(planned, monkeypatch):
    engine, begins = planned
    asked = queries(2, 1, 1, mode="mpc", clients=("a", None, "b"))
    engine(asked)
    engine(asked)
    engine([Query(asked[0].obs, np.array([True, False]), "a", "mpc")])
    assert begins == [[False] * 4, [True, True, False, True], [False, True]]
    monkeypatch.setattr(engine_module, "KEPT_ROWS", 2)      # 3 rows are kept: all but one of them go
    engine(queries(1, mode="mpc", clients=("c",)))
    assert list(engine.clients) == ["c"] and engine.kept == 1 and ("a", 0) not in engine.policy.planner.warm.rows
    engine(asked[2:])
    assert begins[-1] == [False]


def test_a_plan_after_a_request_of_another_mode_starts_cold(planned):
    """Whether that one said that an episode has begun, or came later in the same one: the last plan is not of this moment."""
    engine, begins = planned
    for reset in (True, False):
        begins.clear()
        (plan,), (act,) = queries(2, mode="mpc", clients=("a",)), queries(1, clients=("a",))
        first, other = Query(plan.obs, np.ones(2, bool), "a", "mpc"), queries(1, mode="mpc", clients=("b",))
        for batch in ([first], [plan], [Query(act.obs, np.full(1, reset), "a", "policy"), *other], [plan], [plan]):
            engine(batch)
        assert begins[:2] == [[False] * 2, [True] * 2] and begins[3:] == [[False] * 2, [True] * 2]
    begins.clear()
    for batch in ([plan, act], [Query(plan.obs[:1], np.zeros(1, bool), "a", "mpc")], [plan], [act, plan], [plan]):
        engine(batch)
    assert begins == [[True] * 2, [False], [True, False], [False] * 2, [True] * 2], "also within a batch, and for each row"
    assert not engine.outdated


def test_a_damaged_checkpoint_is_passed_over_and_named(finished_run, tmp_path, capfd):
    run = shutil.copytree(finished_run, tmp_path / "run")
    engine = Engine(run, "policy")
    sound = folders(run / "checkpoints")[0]
    assert not engine.follow()
    damaged = shutil.copytree(sound, sound.with_name("step_000000998_u0000998"))
    (damaged / "learner_policy.safetensors").write_bytes(b"damaged")
    assert not engine.follow() and not engine.follow() and damaged.name in engine.describe()["problem"]
    assert capfd.readouterr().err.count("damaged checkpoint passed over") == 1
    shutil.copytree(sound, sound.with_name("step_000000999_u0000999"))
    assert engine.follow() and engine.describe()["version"] == "step_000000999_u0000999" and engine.describe()["problem"] is None


def test_a_folder_that_is_away_for_a_moment_does_not_end_the_following(finished_run, tmp_path, monkeypatch):
    run = shutil.copytree(finished_run, tmp_path / "run")
    engine, real = Engine(run, "policy"), folders
    sound = real(run / "checkpoints")[0]
    away = True

    def listed(root):
        if away:
            raise OSError(116, "Stale file handle")
        return real(root)
    monkeypatch.setattr(engine_module, "folders", listed)
    server = object.__new__(Server)
    server.engine, looks = engine, []
    monkeypatch.setattr(engine, "follow", lambda follow=engine.follow: looks.append((follow(), engine.describe()["problem"])))

    async def follow():
        nonlocal away
        following = asyncio.create_task(server.follow(0.01))
        for later in ("", "step_000000999_u0000999"):
            away = True
            while looks[-1:] != [(False, "OSError: [Errno 116] Stale file handle")]:
                await asyncio.sleep(0.01)
                assert not following.done()
            if later:
                shutil.copytree(sound, sound.with_name(later))
            away = False
            while looks[-1][1] is not None:
                await asyncio.sleep(0.01)
                assert not following.done()
        following.cancel()
    asyncio.run(asyncio.wait_for(follow(), 60))
    assert engine.describe()["version"] == "step_000000999_u0000999" and [found for found, _ in looks].count(True) == 1


def test_what_cannot_be_served_is_said_in_one_line(server, tmp_path, capsys):
    run, port = str(server.run), str(urlsplit(server.url).port)
    for args, words in ((["serve", str(tmp_path)], "no config.yaml there"), (["serve", run, "--port", port], "cannot listen there"),
                        (["serve", run, "--port", "99999"], "cannot listen there"), (["serve", run, "--host", "nowhere.invalid"], "cannot listen there"),
                        (["serve", run, "--set", "critic.gamma=0.5"], "decides how the run was trained"),
                        (["serve", run, "--seed", "-1"], "must not be negative"), (["serve-bench", run, "--clients", "0"], "at least 1")):
        with pytest.raises(SystemExit) as end:
            cli.main(args)
        said = capsys.readouterr().err
        assert end.value.code == 2 and words in said and len(said.splitlines()) == 1
    with pytest.raises(ValueError, match="url: got 'localhost:8000', expected http://HOST:PORT"):
        PolicyClient("localhost:8000")


def test_ctrl_c_ends_it_and_leaves_nothing(server):
    """As a terminal sends it: to the whole group, also while clients ask."""
    before, over = server.processes(), threading.Event()

    def ask() -> None:
        with PolicyClient(server.url) as client:
            while not over.is_set():
                try:
                    client.act(ROWS)
                except (OSError, RuntimeError, ValueError):
                    return
    asking = threading.Thread(target=ask)
    asking.start()
    os.killpg(server.process.pid, signal.SIGINT)
    assert server.process.wait(240) == 0
    over.set()
    asking.join()
    gone, alive = psutil.wait_procs(before, 120)
    assert not alive and server.log.read_text().endswith("stopped\n") and not list(Path("/tmp").glob(f"modip_ray_{server.process.pid}_*"))
