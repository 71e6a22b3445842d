"""A synthetic run folder that looks like a real HalfCheetah run: same files, same keys, noisy but plausible numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

PRETRAIN_UPDATES, ONLINE_STEPS, HORIZON = 8000, 40_000, 6
CONFIG = """task: {name: halfcheetah-medium, env_id: HalfCheetah-v4}
seed: 0
model: {latent_dim: 128, horizon: 3, hidden: [256, 256]}
planning: {candidates: 128, iterations: 3, guard: ensemble}
"""


def score(rng: np.random.Generator, mean: float, episodes: int = 20) -> dict:
    returns = rng.normal(mean, 0.04 * mean, episodes)
    half = 1.96 * returns.std(ddof=1) / np.sqrt(episodes)
    average = float(returns.mean())
    normalized = 100 * (average + 280.18) / 12415.2
    return {"mean": average, "ci95": [average - half, average + half], "episodes": episodes, "normalized": normalized, "returns": returns.tolist(),
            "values": returns.tolist(), "seeds": list(range(1000, 1000 + episodes))}


def losses(rng: np.random.Generator, updates: int) -> dict:
    fall = np.exp(-updates / 3000)
    noisy = {"consistency": 0.3 * fall + 0.01, "reward": 2.0 * fall + 0.05, "value": 40 * fall + 2, "policy": 0.4 * fall + 0.08}
    return {f"loss/{name}": value * float(np.exp(rng.normal(0, 0.08))) for name, value in noisy.items()}


def diagnostics(rng: np.random.Generator, phase: str, steps: int) -> dict:
    progress = steps / ONLINE_STEPS
    horizon = np.arange(1, HORIZON + 1)
    truth = rng.normal(320, 60, 256)
    predicted = 0.8 * truth + 40 - 25 * (1 - progress) + rng.normal(0, 30 - 12 * progress, 256)
    return {
        "kind": "diagnostics", "phase": phase, "env_steps": steps, "horizon": horizon,
        "latent_r2": 1 - (0.02 + 0.01 * (1 - progress)) * horizon**1.4, "reward_r2": 1 - (0.01 + 0.012 * (1 - progress)) * horizon**1.3,
        "value_pred": predicted, "value_return": truth, "value_corr": np.corrcoef(predicted, truth)[0, 1],
        "plan_gain_mean": 3.0 + 4 * progress, "plan_share_distilled": 0.3 + 0.4 * progress, "plan_share_accepted": 0.9,
        "plan_pred": truth[:128] + 9, "plan_return": truth[:128], "plan_corr": 0.95, "plan_bias": 9.0,
        "plan_acted": [1, 1, 0, 1] * 32, "plan_spread": 0.2, "plan_spread_rejected": 0.15,
        "plan_candidates_std": 0.6, "plan_distance": 0.1, "proposal_distance": 0.05,
    }  # fmt: skip


def system_row(env_steps: int, wall_s: float) -> dict:
    role = {f"{role}/rss_mb": 300.0 + env_steps / 1000 for role in ("driver", "planner", "rollout")}
    waits = {"wait/rollout/planner": 0.6, "wait/rollout/learning": 0.2, "wait/learner_model/collection": 0.1}
    numbers = {"planner/rows_per_batch": 15.2, "planner/answer_ms": 14.0, "planner/updates_behind": 7, "planner/seconds_behind": 0.1, "rollout/workers": 4,
               "planner/restarts": 1 if env_steps > ONLINE_STEPS / 2 else 0, "learner_model/restarts": 0, "replay/ahead": 120}
    at = {"phase": "online", "env_steps": env_steps, "updates": PRETRAIN_UPDATES + env_steps // 4, "wall_s": wall_s}
    return {"kind": "system", **at, **role, **waits, **numbers}


def timing_rows() -> list[dict]:
    planner = {"plan": (300.0, 5000), "plan/ddim": (90.0, 5000), "plan/mppi": (185.0, 5000), "wait/requests": (90.0, 5000), "weights/pull": (4.0, 120)}
    learner = {
        "update": (260.0, 10_000),
        "update/world_model": (150.0, 10_000),
        "update/policy": (80.0, 10_000),
        "wait/replay": (40.0, 900),
        "publish": (3.0, 120),
    }
    rollout = {"env/step": (70.0, 40_000), "wait/plan": (1400.0, 5000), "wait/replay insert": (30.0, 400)}
    rows = []
    for role, spans in (("planner", planner), ("learner", learner), ("rollout", rollout)):
        row = {"kind": "timing", "wall_s": 430.0, "role": role, "seconds": {k: v[0] for k, v in spans.items()}, "counts": {k: v[1] for k, v in spans.items()}}
        rows.append({**row, "workers": 4} if role == "rollout" else row)
    return rows


def metric_rows(seed: int = 0, steps: int = ONLINE_STEPS) -> list[dict]:
    rng = np.random.default_rng(seed)
    rows: list[dict] = [{"kind": "data", **score(rng, 4795, 100), "transitions": 100_000, "source": "demonstrator data", "wall_s": 40.0}]
    for updates in range(0, PRETRAIN_UPDATES + 1, 100):
        rows.append({"kind": "train", "phase": "pretrain", "env_steps": 0, "updates": updates, "wall_s": 40 + updates / 30, **losses(rng, updates)})
    rows.append({**diagnostics(rng, "pretrain", 0), "wall_s": 310.0})
    rows.append({"kind": "eval", "mode": "bc", "env_steps": 0, "updates": PRETRAIN_UPDATES, "wall_s": 320.0, **score(rng, 4650)})
    for env_steps in range(0, steps + 1, 500):
        updates = PRETRAIN_UPDATES + env_steps // 4
        extra = {"replay/online_share": 0.25 + 0.5 * env_steps / ONLINE_STEPS, "rate/env_steps_per_s": 95 + rng.normal(0, 4)}
        rows.append(
            {"kind": "train", "phase": "online", "env_steps": env_steps, "updates": updates, "wall_s": 330 + env_steps / 95, **losses(rng, updates), **extra}
        )
        rows.append(system_row(env_steps, 330 + env_steps / 95))
        if env_steps % 5000 == 0:
            rows.append({**diagnostics(rng, "online", env_steps), "wall_s": 330 + env_steps / 95})
            for mode, start, end in (("policy", 4650, 5600), ("mpc", 5000, 6600)):
                mean = start + (end - start) * (env_steps / ONLINE_STEPS) ** 0.7
                rows.append({"kind": "eval", "mode": mode, "env_steps": env_steps, "updates": updates, "wall_s": 331 + env_steps / 95, **score(rng, mean, 10)})
    rows.append({"kind": "incident", "text": "the planner died & came back", "wall_s": 555.0})
    return [*rows, *timing_rows()]


def summary_of(seed: int = 0) -> dict:
    rng = np.random.default_rng(seed + 1)
    means = {"data": (4795, 100), "bc": (4650, 20), "policy": (5600, 20), "mpc": (6600, 20)}
    return {
        "task": "halfcheetah-medium", "env_id": "HalfCheetah-v4", "run_dir": "runs/demo", "scores": {name: score(rng, *args) for name, args in means.items()},
        "env_steps": ONLINE_STEPS, "updates": PRETRAIN_UPDATES + ONLINE_STEPS // 4, "wall_s": 801.0,
        "phase_s": {"data": 41.0, "pretrain": 268.0, "online": 432.0, "eval": 60.0}, "versions": {"python": "3.11.2", "torch": "2.13.0", "ray": "2.60.0"},
        "git": "0123abc", "machine": {"cores": 2, "memory_gb": 24}, "config_hash": "9f1c2d",
    }  # fmt: skip


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """make_run(name, finished=True, seed=0) -> a run folder written through MetricsLog."""
    from modip_ray.report import MetricsLog

    def make(name: str = "demo", finished: bool = True, seed: int = 0) -> Path:
        folder = tmp_path / name
        with MetricsLog(folder, tensorboard=False) as log:
            for row in metric_rows(seed, ONLINE_STEPS if finished else ONLINE_STEPS // 2):
                log.write(row)
        (folder / "config.yaml").write_text(CONFIG)
        if finished:
            (folder / "summary.json").write_text(json.dumps(summary_of(seed)))
        return folder

    return make
