"""Scores of a configuration over several training seeds, each measured on the same evaluation episodes. No torch, no Ray."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from modip_ray.config import Config
from modip_ray.learning.evaluation import EvalMode, joined
from modip_ray.learning.system import Report
from modip_ray.tasks.scores import normalized_score

REPORTED: tuple[EvalMode, ...] = ("policy", "mpc")
LEVEL = 0.95


def aggregated(cfg: Config, reports: Sequence[Report]) -> dict[str, dict[str, Any]]:
    """{"policy" | "mpc": {"mean", "ci95", "normalized", "return", "by_seed", "metric"}} of one report a training seed.

    mean : of the seeds' means; ci95: by a bootstrap over seeds and, within them, episodes; normalized: D4RL's score of the mean return, or None
    """
    found = {}
    for mode in REPORTED:
        measures = [joined(report.outcomes, mode)[0] for report in reports]
        name = next(iter(measures[0]))
        values = np.array([m[name] for m in measures])                              # (seeds, episodes)
        ret = float(np.mean([m["return"] for m in measures]))
        low, high = nested_bootstrap(values, cfg.eval.bootstrap)
        found[mode] = {"mean": float(values.mean()), "ci95": [low, high], "normalized": normalized_score(cfg.task.family, ret), "return": ret,
                       "by_seed": values.mean(1).tolist(), "metric": name}
    return found


def nested_bootstrap(values: np.ndarray, resamples: int, seed: int = 0) -> tuple[float, float]:
    """Percentile interval of the mean of (seeds, episodes): seeds are drawn with replacement, then episodes of each. Equal values, equal interval."""
    rng = np.random.default_rng(seed)
    n, m = values.shape
    rows = rng.integers(0, n, (resamples, n))                                       # which seeds
    means = np.zeros(resamples)
    for k in range(n):                                                              # one drawn seed at a time keeps the memory small
        means += values[rows[:, k, None], rng.integers(0, m, (resamples, m))].mean(1)
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(means / n, [tail, 100 - tail])
    return float(low), float(high)
