"""One episode: the unit in which data is collected, written, read and evaluated."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Episode:
    """T steps of one environment, in raw environment units.

    observations : (T+1, Do) float32, including the TRUE last observation (never the one of the next reset)
    actions      : (T, Da) float32, as executed
    rewards      : (T,) float32
    terminated   : the last step was a real termination, so nothing may be bootstrapped after it (False: time limit, or cut)
    """

    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    terminated: bool

    @property
    def length(self) -> int:
        """Number of steps T."""
        return len(self.rewards)

    @property
    def ret(self) -> float:
        """Undiscounted return."""
        return float(self.rewards.sum(dtype=np.float64))

    def validate(self, name: str = "episode") -> Episode:
        """Return the episode itself, or raise ValueError with `name` and what is wrong: type, shape, zero length, or the index of the first NaN/inf."""
        for key, dims in (("observations", 2), ("actions", 2), ("rewards", 1)):
            value = getattr(self, key)
            if not isinstance(value, np.ndarray) or value.dtype != np.float32:
                raise ValueError(f"{name}: {key} must be a float32 numpy array, got {getattr(value, 'dtype', type(value).__name__)}")
            if value.ndim != dims:
                raise ValueError(f"{name}: {key} must have {dims} dimension(s), got shape {value.shape}")
        steps = len(self.rewards)
        if steps == 0:
            raise ValueError(f"{name}: has no steps (rewards are empty); an episode needs at least one")
        if len(self.actions) != steps:
            raise ValueError(f"{name}: actions have {len(self.actions)} rows, expected {steps}, one for each reward")
        if len(self.observations) != steps + 1:
            raise ValueError(f"{name}: observations have {len(self.observations)} rows, expected {steps + 1}: one before each step and the one after the last")
        for key in ("observations", "actions", "rewards"):
            index = first_non_finite(getattr(self, key))
            if index is not None:
                raise ValueError(f"{name}: {key}{list(index)} is {getattr(self, key)[index]}; every number must be finite")
        return self


def first_non_finite(array: np.ndarray) -> tuple[int, ...] | None:
    """Index of the first NaN or infinity, None when there is none."""
    finite = np.isfinite(array)
    if finite.all():
        return None
    return tuple(int(i) for i in np.argwhere(~finite)[0])
