"""Scores of a configuration over several training seeds, each measured on the same evaluation episodes. No torch, no Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from modip_ray.config import Config
from modip_ray.learning.evaluation import EvalMode, joined
from modip_ray.learning.system import Report
from modip_ray.tasks.scores import normalized_score

REPORTED: tuple[EvalMode, ...] = ("policy", "mpc")
LEVEL = 0.95


def aggregated(cfg: Config, reports: Sequence[Report]) -> dict[str, dict[str, Any]]:
    """{"policy" | "mpc": {"mean", "ci95", "by_seed", "return", "return_ci95", "return_by_seed", "normalized", ..., "metric"}} of one report a training seed.

    mean       : of the seeds' means of the measure that "metric" names; ci95: by a bootstrap over seeds and, within them, episodes; by_seed: one a seed
    normalized : D4RL's score of the mean return; None, as its interval and its seeds are, for a task without one
    """
    found = {}
    for mode in REPORTED:
        measures = [joined(report.outcomes, mode)[0] for report in reports]
        name = next(iter(measures[0]))
        values, returns = (np.array([m[key] for m in measures]) for key in (name, "return"))       # (seeds, episodes)
        own, ret = summary(values, cfg.eval.bootstrap), summary(returns, cfg.eval.bootstrap)
        found[mode] = {**own, **called("return", ret), **called("normalized", normalized(ret, cfg.task.family)), "metric": name}
    return found


def summary(values: np.ndarray, resamples: int) -> dict[str, Any]:
    """{"mean", "ci95", "by_seed"} of (seeds, episodes)."""
    return {"mean": float(values.mean()), "ci95": list(nested_bootstrap(values, resamples)), "by_seed": values.mean(1).tolist()}


def normalized(returns: Mapping[str, Any], family: str | None) -> dict[str, Any]:
    """The summary of returns by D4RL's score, which is linear in them: that of its mean, of its ends, of each seed."""
    if family is None:
        return dict.fromkeys(returns)
    return {key: [normalized_score(family, x) for x in value] if isinstance(value, list) else normalized_score(family, value) for key, value in returns.items()}


def called(name: str, found: Mapping[str, Any]) -> dict[str, Any]:
    return {name: found["mean"], f"{name}_ci95": found["ci95"], f"{name}_by_seed": found["by_seed"]}


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
