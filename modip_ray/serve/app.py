"""The Ray Serve deployment: HTTP in and out around the engine, and batches of whatever has been asked meanwhile.

`modip serve` starts it on this machine; on a cluster of your own: serve run modip_ray.serve.app:build run=/shared/runs/hopper mode=policy
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve import Application
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from modip_ray.actors.batching import BatchQueue
from modip_ray.config import parse_override
from modip_ray.learning.evaluation import EvalMode
from modip_ray.model.hardware import prepare_process
from modip_ray.serve.engine import Actions, Engine
from modip_ray.serve.query import BadRequest, Query, from_json, from_raw

JSON, RAW = "application/json", "application/octet-stream"
ROUTES = {"/": ("GET", "HEAD"), "/act": ("POST",)}
LOOPBACK = "127.0.0.1"
READ_ON = 2**26                     # bytes of a body too large that are still read, so that its sender gets to read the answer


def stay_on_loopback() -> None:
    """Serve opens a port for other deployments' pickled calls on all interfaces, without a setting for it and without authentication: here on 127.0.0.1."""
    from ray.serve._private import replica
    add_port = replica.add_port_to_grpc_server
    replica.add_port_to_grpc_server = lambda server, address: add_port(server, address.replace("[::]", LOOPBACK))


class Server:
    """follow_s: seconds between two looks for a newer checkpoint; 0: never."""

    async def __init__(self, run: str, mode: EvalMode, overrides: Mapping[str, Any], seed: int, follow_s: float):
        if ray.util.get_node_ip_address() == LOOPBACK:
            stay_on_loopback()
        self.engine = Engine(Path(run), mode, overrides, seed)
        cfg = self.engine.policy.cfg
        self.queue = BatchQueue(self.engine, cfg.planner.max_rows, cfg.planner.max_wait_ms / 1e3,
                                initializer=lambda: prepare_process(cfg.resources.torch_threads), inline=self.engine.device.type == "cpu")
        self.following = asyncio.create_task(self.follow(follow_s)) if follow_s else None

    async def follow(self, every_s: float) -> None:
        while True:
            await asyncio.sleep(every_s)
            await asyncio.to_thread(self.engine.follow)

    async def __call__(self, request: Request) -> Response:
        try:
            return await self.route(request)
        except BadRequest as error:
            return answer(error.answer, error.status)
        except FloatingPointError as error:
            return answer({"error": "actions are not finite", "got": str(error), "allowed": "", "do": "ask again once the run has a better checkpoint"}, 503)

    async def route(self, request: Request) -> Response:
        path, method = request.url.path, request.method
        if path not in ROUTES:
            raise BadRequest(404, "path", path[:100], "GET / and POST /act", "send observations to /act")
        if method not in ROUTES[path]:
            raise BadRequest(405, "method", f"{method} {path}", " or ".join(ROUTES[path]), f"send {ROUTES[path][0]}")
        if path == "/":
            return answer(self.engine.describe())
        raw = content_type(request) == RAW
        body = await self.body(request)
        if not raw and request.url.query:
            raise BadRequest(422, "address", f"?{request.url.query[:60]}", "no fields in the address of a JSON request", "put them into the JSON object")
        query = from_raw(body, request.query_params, self.engine.limits) if raw else from_json(body, self.engine.limits)
        peer = query.client or request.client                           # one connection asks one thing at a time
        actions = await self.queue.submit(peer, query, len(query.obs))
        return raw_answer(actions, query) if raw else json_answer(actions, query)

    async def body(self, request: Request) -> bytes:
        """All of it; BadRequest where it is too large, without keeping more of it than is allowed."""
        parts, size, most = [], 0, self.engine.limits.max_bytes
        try:
            async for part in request.stream():
                size += len(part)
                if size <= most:
                    parts.append(part)
                elif size > READ_ON:
                    break
        except ClientDisconnect as error:
            raise BadRequest(400, "body", f"{size} bytes, then the connection ended", "a whole body", "send it again") from error
        if size > most:
            raise BadRequest(413, "body", f"{'more than ' if size > READ_ON else ''}{size} bytes", f"at most {most} bytes",
                             f"send at most {self.engine.limits.max_rows} observations at a time")
        return b"".join(parts)


def content_type(request: Request) -> str:
    """RAW or JSON (which no header at all stands for as well)."""
    given = request.headers.get("content-type", JSON).partition(";")[0].strip().lower()
    if given not in (JSON, RAW):
        raise BadRequest(415, "Content-Type", given[:100] or "an empty one", f"{JSON}, or {RAW} for float32", "send that header")
    return given


def answer(tree: dict[str, Any], status: int = 200) -> Response:
    return Response(json.dumps(tree), status, media_type=JSON)


def json_answer(actions: Actions, query: Query) -> Response:
    chunk = actions.actions[0] if query.single else actions.actions
    return answer({"actions": chunk.tolist(), "mode": query.mode, "version": actions.version})


def raw_answer(actions: Actions, query: Query) -> Response:
    """B x c x Da float32, little-endian; the sizes in a header."""
    headers = {"x-shape": ",".join(map(str, actions.actions.shape)), "x-mode": query.mode, "x-version": actions.version}
    return Response(actions.actions.astype("<f4").tobytes(), headers=headers, media_type=RAW)


def build(args: Mapping[str, str]) -> Application:
    """For `serve run` and Serve's config files: run=FOLDER, mode, seed, follow_s; all other key=value are settings of acting."""
    own = {"run": "", "mode": "policy", "seed": "0", "follow_s": "10"}
    given = own | {k: v for k, v in args.items() if k in own}
    settings = dict(parse_override(f"{k}={v}") for k, v in args.items() if k not in own)
    return application(Path(given["run"]), given["mode"], settings, int(given["seed"]), float(given["follow_s"]))


def application(run: Path, mode: EvalMode, overrides: Mapping[str, Any], seed: int, follow_s: float, gpus: float = 0.0) -> Application:
    """max_ongoing_requests: how many may wait for their batch. gpus: above 0 where the settings ask for one; the replica sees the one that it gets alone."""
    deployment = serve.deployment(Server, name="policy", max_ongoing_requests=1024, ray_actor_options={"num_cpus": 1, "num_gpus": gpus})
    return deployment.bind(str(run.resolve()), mode, dict(overrides) | ({"resources.device": "cuda"} if gpus else {}), seed, follow_s)
