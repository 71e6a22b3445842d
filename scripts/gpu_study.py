"""Plans and updates a second on a GPU at TD-MPC2's 5 M shapes, and the share of the card's own matrix-product peak that they reach. Writes JSON.

    python scripts/gpu_study.py --json results/gpu/kernels.json [--rows 16 128 256 512] [--device cuda]

--device cpu is for a dry run: the same code, with no claim. The peak is that of one 8192 x 8192 product in bfloat16, measured in the same run (1024 on a CPU).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from modip_ray.bench.rows import ACTION_DIM, OBS_DIM, Setting
from modip_ray.bench.run import flops
from modip_ray.bench.tdmpc2 import SHAPES
from modip_ray.config import load
from modip_ray.learning.learner import Learner
from modip_ray.model.agent import Agent
from modip_ray.model.hardware import prepare_process
from modip_ray.planning.compiled import CompileBeside
from modip_ray.planning.planner import Planner
from modip_ray.runfolder import command_line, git_commit, machine, versions

PATIENCE_S = 300.0                  # with the compiler


def seconds_of(call: Callable[[], object], device: torch.device, least_s: float) -> float:
    """Mean seconds of a call, the device's work included."""
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()
    for _ in range(3):
        call()
    wait()
    begun, calls = time.perf_counter(), 0
    while time.perf_counter() - begun < least_s:
        call()
        calls += 1
    wait()
    return (time.perf_counter() - begun) / calls


def peak_tflops(device: torch.device, least_s: float) -> float:
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in "ab")
    return 2 * n**3 / seconds_of(lambda: a @ b, device, least_s) / 1e12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 128, 256, 512])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    args = parser.parse_args()
    prepare_process(1)
    device, setting = torch.device(args.device), Setting(load(overrides=["resources.precision=bf16"]).replace(SHAPES), args.seconds)
    peak, found, rng = peak_tflops(device, args.seconds), {}, np.random.default_rng(0)
    planner = Planner(setting.cfg, Agent(setting.cfg, OBS_DIM, ACTION_DIM).to(device))

    def measure(name: str) -> None:
        for rows in args.rows:
            obs, old = rng.standard_normal((rows, OBS_DIM), dtype=np.float32), np.zeros(rows, bool)
            took = seconds_of(lambda obs=obs, old=old: planner.plan(obs, range(len(obs)), old), device, args.seconds)
            note(f"{name}, {rows} rows", rows / took, "plans/s", work * rows / took / 1e12)

    def note(name: str, rate: float, unit: str, tflops: float) -> None:
        found[name] = {"rate": rate, "unit": unit, "tflops": tflops, "of_peak": tflops / peak}
        print(f"{name:<40} {rate:>10.1f} {unit:<10} {tflops:>8.2f} TFLOP/s  {100 * tflops / peak:5.1f} % of {peak:.1f}", flush=True)

    one = rng.standard_normal((1, OBS_DIM), dtype=np.float32)
    slow, fast = Planner(setting.cfg, Agent(setting.cfg, OBS_DIM, ACTION_DIM)), planner.find
    work = flops(lambda: slow.plan(one, [0], np.zeros(1, bool)))                    # of a row
    planner.find = planner.search
    measure("planner, bf16")
    planner.find = fast
    if device.type == "cuda":
        measure("planner, bf16, graphs")
    beside = CompileBeside(planner.search)
    beside.thread.join(PATIENCE_S)
    if beside.ready.is_set():
        measure("planner, bf16, graphs, compiled" if device.type == "cuda" else "planner, bf16, compiled")
    learner, batches = Learner(setting.cfg, Agent(setting.cfg, OBS_DIM, ACTION_DIM).to(device)), (setting.model_batch(), setting.policy_batch())
    for name, update in (("world model", lambda: learner.update_model(batches[0])), ("policy", lambda: learner.update_policy(batches[1], distil=True))):
        took = seconds_of(update, device, args.seconds)
        note(f"learner, {name}, batch {len(batches[0]['obs'])}", 1 / took, "updates/s", flops(update) / took / 1e12)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    card = torch.cuda.get_device_name() if device.type == "cuda" else "none"
    args.json.write_text(json.dumps({"measurements": found, "peak_tflops": peak, "card": card, "command": command_line(), "git": git_commit(),
                                     "machine": machine(), "versions": versions()}, indent=1))


if __name__ == "__main__":
    main()
