"""The line between rollout workers and a planner: one TCP connection for each group of environments, one request on its way at a time. No Ray.

A call of a Ray actor costs 1.6 ms of processor time (both ends together), a message on a socket 0.07 ms (`modip bench channel`, docs/scaling.md).
Ray still starts, places and restarts both ends, and tells the workers the address. Messages are plain numbers, never pickle. A connection is
accepted only after an HMAC challenge with a key that the run made for itself and sent through Ray.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
import socket
import struct
from collections.abc import Awaitable, Callable

import numpy as np

from modip_ray.learning.collector import Planned, Query

LENGTH = struct.Struct("<I")
QUESTION = struct.Struct("<iiI8s")              # slot, group, rows n, incarnation; then obs (n, Do) float32, reset (n,) bool
ANSWER = struct.Struct("<BqIII")                # status, weight version, c, H, Da; then actions (n, c, Da), plans (n, H, Da), gains (n,), all float32
FAILED = struct.Struct("<B")                    # status; then what happened, as text
KINDS = (RuntimeError, FloatingPointError)      # by status 1, 2: what is raised where the answer is taken; a policy that has diverged is no error of ours
NONCE = 32
LIMIT = 1 << 26                                 # bytes of a message: more is no message of ours

Answer = Callable[[Query], Awaitable[Planned]]


def pack_query(query: Query) -> bytes:
    slot, group = query.worker
    return QUESTION.pack(slot, group, len(query.obs), query.incarnation.encode()) + query.obs.astype("<f4").tobytes() + query.reset.astype(bool).tobytes()


def unpack_query(data: bytes) -> Query:
    """ValueError for what is no query."""
    if len(data) < QUESTION.size:
        raise ValueError(f"a query of {len(data)} bytes, expected at least {QUESTION.size}")
    slot, group, n, incarnation = QUESTION.unpack_from(data)
    body = len(data) - QUESTION.size - n
    if n == 0 or body <= 0 or body % (4 * n):
        raise ValueError(f"a query of {len(data)} bytes for {n} rows")
    obs = np.frombuffer(data, "<f4", body // 4, QUESTION.size).reshape(n, -1)
    return Query((slot, group), incarnation.decode(), obs, np.frombuffer(data, bool, n, QUESTION.size + body))


def pack_planned(planned: Planned) -> bytes:
    (_, c, da), h = planned.actions.shape, planned.plans.shape[1]
    arrays = (planned.actions, planned.plans, planned.gains)
    return ANSWER.pack(0, planned.version, c, h, da) + b"".join(a.astype("<f4").tobytes() for a in arrays)


def unpack_planned(data: bytes, n: int) -> Planned:
    """RuntimeError with the planner's own words where it failed, FloatingPointError where its policy has diverged."""
    if data[0]:
        raise KINDS[data[0] - 1](data[FAILED.size:].decode())
    _, version, c, h, da = ANSWER.unpack_from(data)
    flat = np.frombuffer(data, "<f4", offset=ANSWER.size).copy()
    actions, plans, gains = np.split(flat, [n * c * da, n * (c + h) * da])
    return Planned(actions.reshape(n, c, da), plans.reshape(n, h, da), gains, version)


def pack_error(error: Exception) -> bytes:
    """Its kind and its words, where the kind is one of KINDS; else words alone, which begin with its name."""
    kind = next((i for i, known in enumerate(KINDS[1:], 2) if isinstance(error, known)), 1)
    return FAILED.pack(kind) + (f"{error}" if kind > 1 else f"{type(error).__name__}: {error}").encode()


def proof(key: bytes, nonce: bytes) -> bytes:
    return hmac.digest(key, nonce, hashlib.sha256)


class Server:
    """Answers each query by `answer`; an exception of it goes to the one who asked. `gone` is told the client whose connection ended."""

    def __init__(self, key: bytes, answer: Answer, gone: Callable[[Query], None] = lambda query: None):
        self.key, self.answer, self.gone = key, answer, gone
        self.server: asyncio.Server | None = None
        self.writers: set[asyncio.StreamWriter] = set()

    async def start(self, host: str) -> tuple[str, int]:
        """Listen on a free port; returns the address."""
        self.server = await asyncio.start_server(self.serve, host)
        return self.server.sockets[0].getsockname()[:2]

    async def stop(self) -> None:
        """Close all connections and the port."""
        if self.server is not None:
            self.server.close()
            for writer in list(self.writers):
                writer.close()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        query = None
        self.writers.add(writer)
        try:
            nonce = secrets.token_bytes(NONCE)
            writer.write(nonce)
            if not hmac.compare_digest(await reader.readexactly(NONCE), proof(self.key, nonce)):
                return
            while True:
                (length,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
                if length > LIMIT:
                    return
                data = await reader.readexactly(length)
                try:
                    query = unpack_query(data)
                    reply = pack_planned(await self.answer(query))
                except Exception as error:                                          # whatever it was, the one who asked must hear of it
                    reply = pack_error(error)
                writer.write(LENGTH.pack(len(reply)) + reply)
        except (asyncio.IncompleteReadError, ConnectionError):                      # the worker is gone
            pass
        finally:
            self.writers.discard(writer)
            writer.close()
            if query is not None:
                self.gone(query)


class Connection:
    """A worker's end. OSError (ConnectionError, TimeoutError) when the planner is gone or silent: connect anew."""

    def __init__(self, address: tuple[str, int], key: bytes, timeout_s: float):
        self.socket = socket.create_connection(address, timeout_s)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.file = self.socket.makefile("rb")
        self.socket.sendall(proof(key, self.read(NONCE)))

    def send(self, query: Query) -> None:
        data = pack_query(query)
        self.socket.sendall(LENGTH.pack(len(data)) + data)

    def receive(self, n: int) -> Planned:
        """The answer to the last query, which had n rows."""
        (length,) = LENGTH.unpack(self.read(LENGTH.size))
        return unpack_planned(self.read(length), n)

    def read(self, n: int) -> bytes:
        data = self.file.read(n)
        if len(data) < n:
            raise ConnectionResetError("the planner closed the connection")
        return data

    def close(self) -> None:
        self.file.close()
        self.socket.close()
