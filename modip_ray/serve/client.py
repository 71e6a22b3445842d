"""A client of `modip serve`: needs NumPy alone, and one connection that stays open."""

from __future__ import annotations

import http.client
import json
from typing import Any
from urllib.parse import urlencode, urlsplit

import numpy as np

GONE = (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError)      # the server closed a connection that was idle for long
JSON, RAW = "application/json", "application/octet-stream"
NO_WATCH = {"x-request-disconnect-disabled": "?1"}          # Serve need not watch whether we hang up while it computes: a fifth of its processor time


class RefusedError(ValueError):
    """The server's 4xx. answer: its error, got, allowed, do."""

    def __init__(self, status: int, answer: dict[str, str]):
        super().__init__(f"{status}: {answer['error']}: got {answer['got']}, allowed {answer['allowed']}; {answer['do']}")
        self.status, self.answer = status, answer


class PolicyClient:
    """Not for several threads at once: make one for each.

    url    : as `modip serve` prints it
    client : a name under which the planner (mode mpc) keeps the last plans as warm starts, one for each row; None: it plans cold each time
    mode   : "policy" or "mpc"; None: the server's own
    as_json: send JSON instead of float32 (slower; docs/serve.md)
    """

    def __init__(self, url: str, client: str | None = None, mode: str | None = None, timeout_s: float = 30.0, as_json: bool = False):
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise ValueError(f"url: got {url!r}, expected http://HOST:PORT as 'modip serve' prints it")
        self.line = http.client.HTTPConnection(parts.hostname, parts.port or 80, timeout=timeout_s)
        self.fields = {k: v for k, v in {"client": client, "mode": mode}.items() if v is not None}
        self.as_json, self.version = as_json, ""
        self.obs_dim = 0                                                            # 0: not asked yet

    def info(self) -> dict[str, Any]:
        """Run, mode, checkpoint, sizes, and what was served."""
        return json.loads(self.request("GET", "/")[0])

    def act(self, obs: np.ndarray, reset: bool | np.ndarray = False) -> np.ndarray:
        """obs (Do,) or (B, Do) raw -> actions (c, Da) or (B, c, Da) to be executed now; `version` then names the checkpoint that acted.

        reset: whether an episode has just begun, for all rows or (B,). RefusedError (a ValueError) where the server refuses it, ValueError on another shape.
        """
        obs = np.asarray(obs)
        if self.as_json:
            return self.act_json(obs, reset)
        self.check(obs)
        digits = "".join("01"[bool(r)] for r in np.atleast_1d(reset))
        fields = {**self.fields, **({"reset": digits} if "1" in digits else {})}
        body, headers = self.request("POST", "/act" + ("?" + urlencode(fields) if fields else ""), obs.astype("<f4").tobytes(), RAW)
        self.version = headers["x-version"]
        actions = np.frombuffer(body, "<f4").reshape([int(n) for n in headers["x-shape"].split(",")])
        return actions[0] if obs.ndim == 1 else actions

    def check(self, obs: np.ndarray) -> None:
        """ValueError for a shape that the server, who gets bytes alone, would take for other rows. It is asked once for the size of an observation."""
        self.obs_dim = self.obs_dim or self.info()["obs_dim"]
        if obs.ndim not in (1, 2) or obs.shape[-1] != self.obs_dim:
            raise ValueError(f"obs: got shape {obs.shape}, expected ({self.obs_dim},) or (rows, {self.obs_dim}); send one observation, or one in each row")

    def act_json(self, obs: np.ndarray, reset: bool | np.ndarray) -> np.ndarray:
        tree = {"observation": obs.tolist(), "reset": np.asarray(reset, bool).tolist(), **self.fields}
        answer = json.loads(self.request("POST", "/act", json.dumps(tree).encode(), JSON)[0])
        self.version = answer["version"]
        return np.array(answer["actions"], np.float32)

    def request(self, method: str, path: str, body: bytes | None = None, content_type: str | None = None) -> tuple[bytes, http.client.HTTPMessage]:
        headers = NO_WATCH | ({"Content-Type": content_type} if content_type else {})
        try:
            try:
                response, text = self.exchange(method, path, body, headers)
            except GONE:                                                            # once more on a new connection: asking twice does no harm
                self.line.close()
                response, text = self.exchange(method, path, body, headers)
        except (OSError, http.client.HTTPException):
            self.line.close()                                                       # what comes late, or what is left half done, would be the next call's
            raise
        if 400 <= response.status < 500:
            raise RefusedError(response.status, json.loads(text))
        if response.status != 200:
            raise RuntimeError(f"{method} {path}: the server answered {response.status} {text[:500].decode(errors='replace')}")
        return text, response.headers

    def exchange(self, method: str, path: str, body: bytes | None, headers: dict[str, str]) -> tuple[http.client.HTTPResponse, bytes]:
        self.line.request(method, path, body, headers)
        response = self.line.getresponse()
        return response, response.read()

    def close(self) -> None:
        self.line.close()

    def __enter__(self) -> PolicyClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
