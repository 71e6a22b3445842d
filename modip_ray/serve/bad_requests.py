"""Generated requests that a server must refuse, of every kind that its checks know. All are proper HTTP."""

from __future__ import annotations

import http.client
import json
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np

JSON, RAW = "application/json", "application/octet-stream"
FIELDS = {"error", "got", "allowed", "do"}


class Bad(NamedTuple):
    kind: str
    status: int                     # of the answer that it must get
    method: str
    path: str
    body: bytes | None = None
    content_type: str | None = JSON


def generate(count: int, info: dict[str, Any], seed: int = 0) -> Iterator[Bad]:
    """`count` of them, kind after kind, with random contents. info: what the server says about itself."""
    rng = np.random.default_rng(seed)
    makers = [*kinds(info, rng)]
    for i in range(count):
        yield makers[i % len(makers)]()


def kinds(info: dict[str, Any], rng: np.random.Generator) -> Iterator[Callable[[], Bad]]:
    size, most = info["obs_dim"], info["max_rows"]

    def row() -> list[float]:
        return rng.standard_normal(size).tolist()

    def with_one(value: Any) -> list[Any]:
        """A row with a wrong value somewhere."""
        numbers: list[Any] = row()
        numbers[rng.integers(size)] = value
        return numbers

    def other(n: int) -> int:
        """A size that is not n, 1 to 3 n."""
        return int(rng.choice([k for k in range(1, 3 * n + 1) if k != n]))

    def word() -> str:
        return "".join(rng.choice([*"abcdefghijklmnopqrstuvwxyz_-öß🤖 "], rng.integers(1, 20)))

    def post(kind: str, tree: Any, status: int = 422) -> Bad:
        return Bad(kind, status, "POST", "/act", json.dumps(tree).encode())

    def raw(kind: str, body: bytes, query: str = "", status: int = 422) -> Bad:
        return Bad(kind, status, "POST", "/act" + query, body, RAW)

    def text(kind: str, body: bytes) -> Bad:
        return Bad(kind, 400, "POST", "/act", body)

    good = np.zeros((2, size), "<f4").tobytes()
    for name, value in {"NaN": np.nan, "infinity": np.inf, "-infinity": -np.inf, "beyond float32": 1e39, "long integer": 10**400, "text": "1.0", "null": None,
                        "true": True, "list": [1.0], "object": {}}.items():
        yield lambda name=name, value=value: post(f"{name} in a row", {"observation": with_one(value)})
        yield lambda name=name, value=value: post(f"{name} in the second row", {"observation": [row(), with_one(value)]})
    for name, value in {"null": None, "text": "abc", "a number": 1.5, "true": True, "an object": {"x": 1}, "no numbers": [], "no rows": [[]]}.items():
        yield lambda name=name, value=value: post(f"observation is {name}", {"observation": value})
        yield lambda name=name, value=value: post(f"body is {name}", value) if value != {"x": 1} else post("no observation", {"reset": True})
    yield lambda: post("wrong size", {"observation": rng.standard_normal(other(size)).tolist()})
    yield lambda: post("wrong size of rows", {"observation": rng.standard_normal((3, other(size))).tolist()})
    yield lambda: post("ragged rows", {"observation": [row(), row()[:-1]]})
    yield lambda: post("too deep", {"observation": [[row()]]})
    yield lambda: post("numbers and rows", {"observation": [row(), 1.0]})
    yield lambda: post("too many rows", {"observation": [[0] * size] * (most + 1)}, 413)
    yield lambda: post("unknown field", {"observation": row(), word(): 1})
    yield lambda: post("field misspelt", {"observation": row(), "rest": True})
    for value in (1, "yes", None, [True] * 7, [1], [], {}):
        yield lambda value=value: post("reset", {"observation": row(), "reset": value})
    for value in (1, "", "x" * 1000, ["a"], {}, False):
        yield lambda value=value: post("client", {"observation": row(), "client": value})
    for value in ("MPC", "fast", 1, ["mpc"], {}, False):
        yield lambda value=value: post("mode", {"observation": row(), "mode": value})
    yield lambda: text("empty body", b"")
    yield lambda: text("no JSON", word().encode())
    yield lambda: text("JSON cut off", json.dumps({"observation": row()}).encode()[:-int(rng.integers(1, 9))])
    yield lambda: text("random bytes", b"\xff" + rng.bytes(40))
    yield lambda: text("nested without end", b"[" * 5_000)
    yield lambda: text("digits without end", b'{"observation": [' + b"9" * 5_000 + b"]}")
    yield lambda: Bad("body too large", 413, "POST", "/act", b" " * (info["max_bytes"] + int(rng.integers(1, 10**6))))
    yield lambda: Bad("raw body too large", 413, "POST", "/act", b"\0" * (info["max_bytes"] + int(rng.integers(1, 10**6))), RAW)
    yield lambda: raw("bytes of a part of a row", rng.bytes(4 * size * 3 + int(rng.integers(1, 4 * size))))
    yield lambda: raw("no bytes", b"")
    yield lambda: raw("NaN as bytes", np.array(with_one(np.nan), "<f4").tobytes())
    yield lambda: raw("too many rows as bytes", np.zeros((most + 1, size), "<f4").tobytes(), status=413)
    for query in ("?reset=maybe", "?reset=", "?reset=011", "?client=", "?mode=best", "?speed=9", "?client=" + "y" * 200):
        yield lambda query=query: raw(f"address {query[:12]}", good, query)
    yield lambda: Bad("fields in the address of JSON", 422, "POST", "/act?reset=1", json.dumps({"observation": row()}).encode())
    for content_type in ("text/plain", "application/x-python-pickle", "multipart/form-data", "x"):
        yield lambda content_type=content_type: Bad("content type", 415, "POST", "/act", good, content_type)
    for method in ("GET", "PUT", "DELETE", "PATCH", "OPTIONS"):
        yield lambda method=method: Bad("method", 405, method, "/act")
    yield lambda: Bad("method of /", 405, "POST", "/", b"{}")
    for path in ("/acts", "/act/", "/../../etc/passwd", "/%00", "/docs"):
        yield lambda path=path: Bad("path", 404, "POST", path, b"{}")


def send(url: str, requests: Iterator[Bad]) -> tuple[Counter, list[str]]:
    """Refusals by kind, and a line for each answer that was not the right one: of the due status, in JSON that says error, got, allowed and do."""
    refused: Counter = Counter()
    wrong = []
    line = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
    for bad in requests:
        line.request(bad.method, bad.path, bad.body, {"Content-Type": bad.content_type} if bad.content_type else {})
        response = line.getresponse()
        text = response.read()
        try:
            answer = json.loads(text)
            clear = set(answer) == FIELDS and all(isinstance(v, str) and v for v in answer.values())
        except ValueError:
            clear = False
        if clear and response.status == bad.status:
            refused[bad.kind] += 1
        else:
            wrong.append(f"{bad.kind}: {response.status} {text[:200]!r}")
    line.close()
    return refused, wrong
