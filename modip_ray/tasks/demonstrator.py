"""Tanh-Gaussian policies in plain numpy: the demonstrators shipped with the package, and the behaviour policies inside D4RL files."""
from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from modip_ray.tasks.d4rl_data import DataError, read_policy

LAYERS = ("fc0", "fc1", "last_fc", "last_fc_log_std")
LOG_STD_RANGE, D4RL_LOG_STD_RANGE = (-5.0, 2.0), (-20.0, 2.0)
ASSETS = Path(__file__).resolve().parent.parent / "assets"


class Demonstrator(NamedTuple):
    """Its environment, the range of its mean return (the level of D4RL medium), and the script with its arguments that trained it."""

    env_id: str
    band: tuple[int, int]
    trained_by: str


DEMONSTRATORS = {
    "halfcheetah": Demonstrator("HalfCheetah-v4", (4500, 5000), "train_demonstrator.py HalfCheetah-v4 --lr 3e-4 --seed 1"),
    "hopper": Demonstrator("Hopper-v4", (1200, 1600), "train_demonstrator.py Hopper-v4"),
    "walker2d": Demonstrator("Walker2d-v4", (2500, 3500), "train_demonstrator_ppo.py Walker2d-v4"),
}


@dataclass(frozen=True, eq=False)
class TanhGaussianPolicy:
    """a = tanh(mean(s) + std(s) * eps), with mean and log std on top of a ReLU network of two layers (soft actor-critic's actor).

    weights       : {"fc0.weight": (width, Do), "fc0.bias": (width,), "fc1.*", "last_fc.*": (Da, width), "last_fc_log_std.*"}, float32
    log_std_range : what the log std is clipped to
    meta          : what the file says about itself
    """

    weights: dict[str, np.ndarray]
    log_std_range: tuple[float, float]
    meta: dict = field(default_factory=dict)

    @property
    def obs_dim(self) -> int:
        return self.weights["fc0.weight"].shape[1]

    @property
    def action_dim(self) -> int:
        return self.weights["last_fc.weight"].shape[0]

    @classmethod
    def from_npz(cls, path: str | Path) -> TanhGaussianPolicy:
        """A policy saved by scripts/train_demonstrator.py (log std clipped to [-5, 2]); DataError names what is missing or of a wrong shape."""
        path = Path(path)
        if not path.is_file():
            raise DataError(f"{path}: no such file")
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {key: file[key] for key in file.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(f"{path}: cannot be read as npz ({error}); expected the file that scripts/train_demonstrator.py writes") from error
        try:
            meta = json.loads(str(arrays.get("meta", "{}")))
        except json.JSONDecodeError as error:
            raise DataError(f"{path}: key 'meta' is not JSON ({error})") from error
        if not isinstance(meta, dict):
            raise DataError(f"{path}: key 'meta' must be a JSON object, got {meta!r}")
        return cls(_checked(path, arrays), LOG_STD_RANGE, meta)

    @classmethod
    def from_d4rl(cls, path: str | Path) -> TanhGaussianPolicy:
        """The behaviour policy inside a D4RL HDF5 file (metadata/policy); its log std is clipped to [-20, 2] there."""
        found = read_policy(path)
        for key, expected in (("nonlinearity", "relu"), ("output_distribution", "tanh_gaussian")):
            if found.get(key, expected) != expected:
                raise DataError(f"{path}: metadata/policy/{key} is {found[key]!r}; only {expected!r} is supported")
        return cls(_checked(Path(path), found), D4RL_LOG_STD_RANGE, {"source": str(path)})

    def to_metadata(self) -> dict:
        """The nested mapping that write_d4rl stores under metadata["policy"] and from_d4rl reads."""
        tree: dict = {"nonlinearity": "relu", "output_distribution": "tanh_gaussian"}
        for key, value in self.weights.items():
            layer, kind = key.split(".")
            tree.setdefault(layer, {})[kind] = value
        return tree

    def distribution(self, obs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation (B, Da) before the tanh, for obs (B, Do)."""
        if obs.ndim != 2 or obs.shape[1] != self.obs_dim:
            raise ValueError(f"observations must have shape (B, {self.obs_dim}), got {obs.shape}: is this policy for another environment?")
        h = np.asarray(obs, np.float32)                                             # (B, Do)
        h = np.maximum(self._linear("fc0", h), 0)                                   # (B, width)
        h = np.maximum(self._linear("fc1", h), 0)                                   # (B, width)
        return self._linear("last_fc", h), np.exp(np.clip(self._linear("last_fc_log_std", h), *self.log_std_range))

    def act(self, obs: np.ndarray, rng: np.random.Generator | None = None, deterministic: bool = False) -> np.ndarray:
        """Actions (B, Da) in [-1, 1] for obs (B, Do); tanh of the mean when deterministic, else sampled with `rng`."""
        mean, std = self.distribution(obs)
        if deterministic:
            return np.tanh(mean)
        if rng is None:
            raise ValueError("sampling needs a numpy Generator: pass rng, or deterministic=True")
        return np.tanh(mean + std * rng.standard_normal(mean.shape, np.float32))

    def log_prob(self, obs: np.ndarray, actions: np.ndarray) -> np.ndarray:
        """Log density (B,) of actions (B, Da), each in (-1, 1)."""
        mean, std = (x.astype(np.float64) for x in self.distribution(obs))
        a = np.clip(actions.astype(np.float64), -1 + 1e-7, 1 - 1e-7)
        gaussian = -0.5 * ((np.arctanh(a) - mean) / std) ** 2 - np.log(std) - 0.5 * np.log(2 * np.pi)     # (B, Da)
        return (gaussian - np.log(1 - a**2 + 1e-6)).sum(1)

    def _linear(self, layer: str, x: np.ndarray) -> np.ndarray:
        return x @ self.weights[f"{layer}.weight"].T + self.weights[f"{layer}.bias"]


def demonstrator_path(name: str) -> Path:
    """The demonstrator shipped for "halfcheetah", "hopper" or "walker2d"; FileNotFoundError says how to train it."""
    if name not in DEMONSTRATORS:
        raise ValueError(f"no demonstrator {name!r}; there are {', '.join(DEMONSTRATORS)}")
    path = ASSETS / f"demonstrator_{name}.npz"
    if not path.is_file():
        low, high = DEMONSTRATORS[name].band
        raise FileNotFoundError(f"{path} is missing; train it with: python scripts/{DEMONSTRATORS[name].trained_by} --band {low} {high} --out {path}")
    return path


def _checked(path: Path, found: Mapping) -> dict[str, np.ndarray]:
    """The eight weight arrays as float32, with shapes that fit together."""
    missing = [key for layer in LAYERS for key in (f"{layer}.weight", f"{layer}.bias") if key not in found]
    if missing:
        raise DataError(f"{path}: misses {', '.join(missing)}; it has {', '.join(sorted(found)) or 'nothing'}")
    weights = {f"{layer}.{kind}": np.asarray(found[f"{layer}.{kind}"]) for layer in LAYERS for kind in ("weight", "bias")}
    for key, value in weights.items():
        if value.dtype.kind != "f" or value.ndim != (2 if key.endswith("weight") else 1) or not np.isfinite(value).all():
            raise DataError(f"{path}: {key} must be a finite float {'matrix' if key.endswith('weight') else 'vector'}, got {value.dtype} {value.shape}")
    obs_dim, width0, width1, action_dim = weights["fc0.weight"].shape[1], len(weights["fc0.bias"]), len(weights["fc1.bias"]), len(weights["last_fc.bias"])
    shapes = {"fc0": (width0, obs_dim), "fc1": (width1, width0), "last_fc": (action_dim, width1), "last_fc_log_std": (action_dim, width1)}
    for layer, expected in shapes.items():
        weight, bias = weights[f"{layer}.weight"], weights[f"{layer}.bias"]
        if weight.shape != expected or len(bias) != expected[0]:
            raise DataError(f"{path}: {layer} has weight {weight.shape} and bias {bias.shape}, expected (out, in) = {expected} and ({expected[0]},)")
    return {key: np.ascontiguousarray(value, np.float32) for key, value in weights.items()}
