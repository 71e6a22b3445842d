"""Scores: D4RL's normalisation, bootstrap intervals, and paired differences between two agents on the same seeds."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

#: D4RL reference returns (random, expert) by environment family; the kitchen's raw score is the number of subtasks done, 0..4.
REFERENCE: dict[str, tuple[float, float]] = {
    "halfcheetah": (-280.178953, 12135.0),
    "hopper": (-20.272305, 3234.3),
    "walker2d": (1.629008, 4592.3),
    "ant": (-325.6, 3879.7),
    "kitchen": (0.0, 4.0),
}
RESAMPLES = 10_000
_BLOCK = 2_000_000  # resampled indices held at a time: 16 MB


def env_family(env_id: str) -> str | None:
    """Family in REFERENCE of a gymnasium id or a D4RL name ("HalfCheetah-v4", "kitchen-complete-v0"); None when unknown."""
    name = env_id.split("/")[-1].split("-")[0].lower()
    name = "kitchen" if name == "frankakitchen" else name
    return name if name in REFERENCE else None


def normalized_score(family: str | None, raw: float) -> float | None:
    """D4RL's score: 0 = random, 100 = expert. None for a task without references (`family` None); ValueError for an unknown family."""
    if family is None:
        return None
    if family not in REFERENCE:
        raise ValueError(f"no reference scores for {family!r}; known: {', '.join(REFERENCE)}; pass None for a task of your own")
    low, high = REFERENCE[family]
    return 100.0 * (float(raw) - low) / (high - low)


def bootstrap_ci(values: Sequence[float] | np.ndarray, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0) -> list[float]:
    """Percentile interval [lo, hi] of the mean by the bootstrap; the same values always give the same interval."""
    x = _finite_vector("values", values)
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    rows = max(1, _BLOCK // len(x))
    for start in range(0, resamples, rows):
        count = min(rows, resamples - start)
        means[start:start + count] = x[rng.integers(0, len(x), (count, len(x)))].mean(1)
    tail = 50.0 * (1.0 - level)
    return [float(v) for v in np.percentile(means, [tail, 100.0 - tail])]


def score_summary(returns: Sequence[float] | np.ndarray, family: str | None = None, seeds: Sequence[int] | None = None) -> dict:
    """{"mean", "ci95": [lo, hi], "episodes", "normalized", "returns", "seeds"} of some episodes' returns; JSON-ready. `seeds`: one a return, or None."""
    x = _finite_vector("returns", returns)
    seeds = [] if seeds is None else [int(s) for s in seeds]
    if seeds and len(seeds) != len(x):
        raise ValueError(f"{len(x)} returns but {len(seeds)} seeds; give one seed for each return, or none")
    mean = float(x.mean())
    return {"mean": mean, "ci95": bootstrap_ci(x), "episodes": len(x), "normalized": normalized_score(family, mean), "returns": x.tolist(), "seeds": seeds}


def paired_difference(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> dict:
    """{"mean", "ci95"} of a - b, where a[i] and b[i] were measured on the same seed: the seeds' own spread cancels."""
    x, y = _finite_vector("a", a), _finite_vector("b", b)
    if len(x) != len(y):
        raise ValueError(f"a has {len(x)} returns and b has {len(y)}; a paired difference needs the same seeds in both")
    return {"mean": float((x - y).mean()), "ci95": bootstrap_ci(x - y)}


def _finite_vector(name: str, values: Sequence[float] | np.ndarray) -> np.ndarray:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or len(x) == 0:
        raise ValueError(f"{name} must be a non-empty list of numbers, got shape {x.shape}")
    if not np.isfinite(x).all():
        raise ValueError(f"{name}[{int(np.flatnonzero(~np.isfinite(x))[0])}] is not finite; every return must be a number")
    return x
