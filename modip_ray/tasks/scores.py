"""Scores: what an episode is judged by, D4RL's normalisation, bootstrap intervals, and paired differences between two agents on the same seeds."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from modip_ray.tasks.episode import Episode
from modip_ray.tasks.references import references

#: D4RL reference returns (random, expert) by environment family; the kitchen's raw score is the number of subtasks done, 0..4.
WRITTEN: dict[str, tuple[float, float]] = {
    "halfcheetah": (-280.178953, 12135.0),
    "hopper": (-20.272305, 3234.3),
    "walker2d": (1.629008, 4592.3),
    "ant": (-325.6, 3879.7),
    "kitchen": (0.0, 4.0),
}
#: The same from the d4rl package itself where it is installed.
REFERENCE = references(WRITTEN)
RESAMPLES = 10_000
SUBTASKS = 4                    # of a kitchen task

#: Measures of one episode by metric (config task.metric), from its rewards (T,) alone. The first is the headline.
#: subtasks: the kitchen's reward is the number of subtasks newly done; success: robomimic's reward is 1 while the task is solved, else 0.
MEASURES: dict[str, dict[str, Callable[[np.ndarray], float]]] = {
    "return": {"return": lambda r: float(r.sum(dtype=np.float64))},
    "subtasks": {"subtasks/4": lambda r: float(r.sum()) / SUBTASKS, "all four": lambda r: float(r.sum() >= SUBTASKS), "return": lambda r: float(r.sum())},
    "success": {"success": lambda r: float(r.max() >= 1), "return": lambda r: float(r.sum(dtype=np.float64))},
}
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
    tail = 50.0 * (1.0 - level)
    return [float(v) for v in np.percentile(resampled_means(x, resamples, np.random.default_rng(seed)), [tail, 100.0 - tail])]


def resampled_means(x: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Means (resamples,) of as many values as `x` has, drawn from it with replacement. A block at a time: the draws are the same, the memory is small."""
    means = np.empty(resamples)
    rows = max(1, _BLOCK // len(x))
    for start in range(0, resamples, rows):
        count = min(rows, resamples - start)
        means[start:start + count] = x[rng.integers(0, len(x), (count, len(x)))].mean(1)
    return means


def measure(metric: str, episodes: Sequence[Episode]) -> dict[str, list[float]]:
    """{measure: one value an episode}, the headline first, "return" always among them."""
    return {name: [of(e.rewards) for e in episodes] for name, of in MEASURES[metric].items()}


def score_summary(measures: Mapping[str, Sequence[float]], family: str | None = None, seeds: Sequence[int] | None = None, resamples: int = RESAMPLES) -> dict:
    """{"metric", "mean", "ci95": [lo, hi], "episodes", "normalized", "values", "returns", "seeds", "also"} of some episodes; JSON-ready.

    measures : as from `measure`; the first one is the headline, whose values, mean and interval come first; "also" has those of the others
    family   : of D4RL's normalised score (of the mean *return*), or None
    seeds    : one an episode, or None
    """
    metric = next(iter(measures))
    x, returns = _finite_vector(metric, measures[metric]), _finite_vector("return", measures["return"])
    seeds = [] if seeds is None else [int(s) for s in seeds]
    if seeds and len(seeds) != len(x):
        raise ValueError(f"{len(x)} episodes but {len(seeds)} seeds; give one seed for each episode, or none")
    also = {name: {"mean": float(np.mean(v)), "ci95": bootstrap_ci(v, resamples=resamples)} for name, v in measures.items() if name != metric}
    return {"metric": metric, "mean": float(x.mean()), "ci95": bootstrap_ci(x, resamples=resamples), "episodes": len(x),
            "normalized": normalized_score(family, float(returns.mean())), "values": x.tolist(), "returns": returns.tolist(), "seeds": seeds, "also": also}


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
