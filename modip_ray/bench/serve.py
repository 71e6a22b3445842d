"""Latency and throughput of `modip serve` under concurrent clients, against the same policy called directly with all their observations as one batch."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil

from modip_ray.bench.rows import Row, compared
from modip_ray.policy import RunPolicy, load
from modip_ray.serve.bad_requests import generate, send
from modip_ray.serve.client import PolicyClient
from modip_ray.serve.start import served

WARM_UP = 5                         # requests of each client


class Case(NamedTuple):
    name: str
    mode: str
    rows: int = 1                   # observations of each request
    as_json: bool = False
    alone: bool = False             # one client in place of all


CASES = (Case("policy", "policy"), Case("policy_json", "policy", as_json=True), Case("policy_16_rows", "policy", rows=16),
         Case("policy_16_rows_json", "policy", rows=16, as_json=True),
         Case("policy_1_client", "policy", alone=True), Case("mpc", "mpc"))


class Load(NamedTuple):
    latency_s: np.ndarray           # of each request
    wall_s: float
    server_s: float                 # processor time of all of Ray's processes


def measure(run: Path, clients: int, seconds: float, bad: int) -> tuple[list[Row], list[str]]:
    """The rows, and a line for each bad request that was not refused as it should be."""
    rows = []
    with served(run, port=0, follow_s=0) as url:
        policies = {mode: load(run, mode) for mode in ("policy", "mpc")}
        for case in CASES:
            rows += case_rows(url, case, 1 if case.alone else clients, seconds, policies[case.mode])
        with PolicyClient(url) as client:
            refused, wrong = send(url, generate(bad, client.info()))
            client.act(np.zeros(policies["policy"].obs_dim))                        # it lives
    rows.append(compared("serve.bad_requests_refused", sum(refused.values()), "answers", bad, f"sent, of {len(refused)} kinds; each a clear 4xx"))
    return rows, wrong


def case_rows(url: str, case: Case, clients: int, seconds: float, policy: RunPolicy) -> list[Row]:
    batch = clients * case.rows
    before = bare(policy, batch, seconds / 5)
    load = under_load(url, case, clients, seconds, policy.obs_dim)
    call_s, call_cpu_s = np.median([before, bare(policy, batch, seconds / 5)], 0)
    ms, asked = 1e3 * load.latency_s, f"a bare PyTorch call with {batch} rows"
    name = f"serve.{case.name}"
    return [compared(f"{name}.actions_per_s", len(ms) * case.rows / load.wall_s, "1/s", batch / call_s, f"{asked}; {clients} clients, {case.rows} rows each"),
            compared(f"{name}.p50_ms", float(np.percentile(ms, 50)), "ms", 1e3 * call_s, asked),
            compared(f"{name}.p95_ms", float(np.percentile(ms, 95)), "ms", 1e3 * call_s, asked),
            compared(f"{name}.processor_ms", 1e3 * load.server_s / len(ms), "ms", 1e3 * call_cpu_s / clients, "the request's share of the bare call")]


def bare(policy: RunPolicy, rows: int, seconds: float) -> tuple[float, float]:
    """Median seconds of a call with so many observations, and mean seconds of its processor time."""
    obs, reset, times = observations(rows, policy.obs_dim), np.zeros(rows, bool), []
    policy.chunks(obs, range(rows), reset)
    used, end = time.process_time(), time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        begun = time.perf_counter()
        policy.chunks(obs, range(rows), reset)
        times.append(time.perf_counter() - begun)
    return float(np.median(times)), (time.process_time() - used) / len(times)


def under_load(url: str, case: Case, clients: int, seconds: float, obs_dim: int) -> Load:
    """Each client asks again as soon as it is answered, in a thread of its own with a connection of its own."""
    ready, found, errors = threading.Barrier(clients + 1), [], []

    def ask(number: int) -> None:
        try:
            obs, times = observations(case.rows, obs_dim, number), []
            with PolicyClient(url, client=f"client{number}", mode=case.mode, as_json=case.as_json) as client:
                for _ in range(WARM_UP):
                    client.act(obs)
                ready.wait(60)
                end = time.perf_counter() + seconds
                while (begun := time.perf_counter()) < end:
                    client.act(obs)
                    times.append(time.perf_counter() - begun)
            found.append(times)
        except Exception as error:                                                  # of whatever kind: the measurement is void
            errors.append(error)
            ready.abort()

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(clients)]
    for thread in threads:
        thread.start()
    try:
        ready.wait(60)
        begun, used = time.perf_counter(), processor_s()
        for thread in threads:
            thread.join()
        wall_s, server_s = time.perf_counter() - begun, processor_s() - used
    except threading.BrokenBarrierError:
        pass
    if errors:
        raise errors[0]
    return Load(np.concatenate(found), wall_s, server_s)


def observations(rows: int, size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, size), np.float32)


def processor_s() -> float:
    """Of this process's children, Ray's, so far."""
    used = 0.0
    for process in psutil.Process().children(recursive=True):
        try:
            t = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        used += t.user + t.system
    return used
