"""The line between rollout workers and planner, on real sockets."""

import asyncio
import socket
import threading
import time

import numpy as np
import pytest

from modip_ray.actors.channel import LENGTH, LIMIT, NONCE, Connection, Server, pack_planned, pack_query, proof, unpack_planned, unpack_query
from modip_ray.learning.collector import Planned, Query

KEY = b"k" * 32


def query(n=3, obs_dim=5, slot=4, group=1):
    rng = np.random.default_rng(0)
    return Query((slot, group), "0123abcd", rng.standard_normal((n, obs_dim)).astype(np.float32), rng.random(n) < 0.5)


def planned(q, version=7):
    n = len(q.obs)
    actions = np.repeat(q.obs[:, None, :2], 2, 1)
    return Planned(actions, np.repeat(q.obs[:, None, :2], 3, 1), np.where(np.arange(n) == 0, np.nan, q.obs[:, 0]).astype(np.float32), version)


@pytest.fixture
def server():
    """A server in a thread of its own: (address, what it saw, the one to call `gone` with, a switch that makes it fail)."""
    loop, state = asyncio.new_event_loop(), {"seen": [], "gone": [], "fail": None}

    async def answer(q):
        state["seen"].append(q)
        if state["fail"]:
            raise state["fail"]
        return planned(q)
    line = Server(KEY, answer, lambda q: state["gone"].append(q.worker))
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    state["address"] = asyncio.run_coroutine_threadsafe(line.start("127.0.0.1"), loop).result(60)
    yield state
    asyncio.run_coroutine_threadsafe(line.stop(), loop).result(60)
    asyncio.run_coroutine_threadsafe(asyncio.sleep(0.05), loop).result(60)           # let the connections' coroutines end
    loop.call_soon_threadsafe(loop.stop)
    thread.join(60)
    loop.close()


def test_packing_is_exact():
    q = query()
    back = unpack_query(pack_query(q))
    assert back.worker == q.worker and back.incarnation == q.incarnation and np.array_equal(back.obs, q.obs) and np.array_equal(back.reset, q.reset)
    p, got = planned(q), unpack_planned(pack_planned(planned(q)), len(q.obs))
    assert got.version == 7 and all(np.array_equal(a, b, equal_nan=True) for a, b in zip(p[:3], got[:3], strict=True))


def test_questions_and_answers(server):
    lines = [Connection(server["address"], KEY, 5) for _ in range(3)]
    questions = [query(n=i + 1, slot=i) for i in range(3)]
    for line, q in zip(lines, questions, strict=True):
        line.send(q)
    for line, q in reversed(list(zip(lines, questions, strict=True))):
        assert np.array_equal(line.receive(len(q.obs)).plans, planned(q).plans)
    for line in lines:
        line.close()
    deadline = time.monotonic() + 90
    while len(server["gone"]) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert {w[0] for w in server["gone"]} == {0, 1, 2}


def test_an_error_goes_to_the_one_who_asked_and_the_line_stays(server):
    line = Connection(server["address"], KEY, 5)
    server["fail"] = ValueError("observation is nan in column 3")
    line.send(query())
    with pytest.raises(RuntimeError, match="ValueError: observation is nan in column 3"):
        line.receive(3)
    server["fail"] = FloatingPointError("planner: the policy of weight version 7 proposes actions that are not finite")
    line.send(query())
    with pytest.raises(FloatingPointError, match="^planner: the policy of weight version 7"):
        line.receive(3)
    server["fail"] = None
    line.send(query())
    assert line.receive(3).version == 7


def test_a_wrong_key_is_not_answered(server):
    line = Connection(server["address"], b"x" * 32, 5)
    with pytest.raises(OSError):
        line.send(query())
        line.receive(3)
    assert not server["seen"]


def test_garbage_ends_its_own_connection_only(server):
    good = Connection(server["address"], KEY, 5)
    bad = socket.create_connection(server["address"], 5)
    bad.sendall(proof(KEY, bad.recv(NONCE)) + LENGTH.pack(LIMIT + 1))
    assert bad.recv(1) == b""
    short = Connection(server["address"], KEY, 5)
    short.socket.sendall(LENGTH.pack(3) + b"abc")
    with pytest.raises(RuntimeError, match="a query of 3 bytes"):
        short.receive(1)
    good.send(query())
    assert good.receive(3).version == 7


def test_a_planner_that_goes_away_is_an_os_error():
    listener = socket.create_server(("127.0.0.1", 0))

    def accept_and_leave():
        other, _ = listener.accept()
        other.sendall(b"n" * NONCE)
        other.recv(NONCE)
        other.close()
    thread = threading.Thread(target=accept_and_leave, daemon=True)
    thread.start()
    line = Connection(address := listener.getsockname(), KEY, 5)
    thread.join(60)
    with pytest.raises(OSError):
        line.send(query())
        line.receive(3)
    listener.close()
    with pytest.raises(OSError):
        Connection(address, KEY, 1)
