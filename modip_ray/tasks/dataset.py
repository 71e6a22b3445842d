"""What every dataset reader returns, its statistics, and the error every reader raises."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from modip_ray.tasks.episode import Episode


class DataError(ValueError):
    """A data file is not what it should be; the message names the file, the key, the index and what was expected."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Episodes in raw units and where they come from.

    metadata : what the file says about itself (short text and numbers; policies are read by read_policy)
    notes    : what the reader had to drop, cut or fill in, one sentence each
    """

    episodes: list[Episode]
    source: str
    metadata: dict = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def transitions(self) -> int:
        return sum(e.length for e in self.episodes)

    @property
    def returns(self) -> list[float]:
        """One undiscounted return an episode."""
        return [e.ret for e in self.episodes]


def statistics(dataset: Dataset) -> dict:
    """Counts, returns, lengths and ranges of a dataset, JSON-ready. Ranges are lists, one number a dimension."""
    episodes = dataset.episodes
    if not episodes:
        raise DataError(f"{dataset.source}: holds no episode")
    low, high = (np.stack([getattr(e.actions, what)(0) for e in episodes]) for what in ("min", "max"))
    obs_low, obs_high = (np.stack([getattr(e.observations, what)(0) for e in episodes]) for what in ("min", "max"))
    return {
        "source": dataset.source, "episodes": len(episodes), "transitions": dataset.transitions,
        "terminated": sum(e.terminated for e in episodes), "obs_dim": obs_low.shape[1], "action_dim": low.shape[1],
        "return": _spread(dataset.returns), "length": _spread([e.length for e in episodes]),
        "action_low": low.min(0).tolist(), "action_high": high.max(0).tolist(),
        "obs_low": obs_low.min(0).tolist(), "obs_high": obs_high.max(0).tolist(), "notes": list(dataset.notes),
    }


def describe(dataset: Dataset) -> str:
    """A small text table for `modip data info`."""
    s = statistics(dataset)
    ret, length = s["return"], s["length"]
    rows = [
        ("source", s["source"]),
        ("episodes", f"{s['episodes']:,}  ({s['terminated']:,} terminated, {s['episodes'] - s['terminated']:,} by time limit or cut)"),
        ("transitions", f"{s['transitions']:,}"),
        ("return", f"{ret['mean']:.1f} ± {ret['std']:.1f}  (min {ret['min']:.1f}, max {ret['max']:.1f})"),
        ("length", f"{length['mean']:.1f} ± {length['std']:.1f}  (min {length['min']:.0f}, max {length['max']:.0f})"),
        ("observations", f"{s['obs_dim']} numbers in [{min(s['obs_low']):.3g}, {max(s['obs_high']):.3g}]"),
        ("actions", f"{s['action_dim']} numbers in [{min(s['action_low']):.3f}, {max(s['action_high']):.3f}]"),
    ]
    rows += [(f"metadata/{key}", str(value)) for key, value in dataset.metadata.items()]
    rows += [("note", note) for note in dataset.notes]
    width = max(len(key) for key, _ in rows)
    return "\n".join(f"{key:<{width}}  {value}" for key, value in rows)


def _spread(values: Sequence[float]) -> dict[str, float]:
    x = np.asarray(values, np.float64)
    return {"mean": float(x.mean()), "std": float(x.std()), "min": float(x.min()), "max": float(x.max())}
