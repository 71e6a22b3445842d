"""A run's diffusion policy as one file that needs neither Ray nor this package: raw observations and noise in, raw action chunks out.

Symbols: B rows, Do / Da sizes of observation and action, H chunk length.
"""

from __future__ import annotations

import importlib.util
import json
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from modip_ray.baselines.dppo_policy import TunedPolicy
from modip_ray.baselines.dsrl import SteeredPolicy
from modip_ray.baselines.tdmpc2 import LatentPolicy
from modip_ray.config import Config
from modip_ray.learning.offline_data import stored_source
from modip_ray.learning.offline_rows import mapped
from modip_ray.model.agent import Normalizer
from modip_ray.model.diffusion import DiffusionPolicy
from modip_ray.model.gaussian import GaussianPolicy, policy_of
from modip_ray.oneline import first_line
from modip_ray.policy import SavedAgent, agent_of_run
from modip_ray.runfolder import RunError, git_commit, read_summary, saved_config, versions
from modip_ray.tasks.dataset import DataError
from modip_ray.tasks.readers import read_any

Format = Literal["torch-export", "onnx", "safetensors"]
PolicyMode = Literal["bc", "policy"]
Run = Callable[[np.ndarray, np.ndarray], np.ndarray]        # observation (B, Do), noise (B, H, Da) or (B, n, H, Da) -> actions (B, H, Da)

SUFFIXES: dict[Format, str] = {"torch-export": ".pt2", "onnx": ".onnx", "safetensors": ".safetensors"}
NEEDS: dict[Format, tuple[str, ...]] = {"torch-export": (), "onnx": ("onnx", "onnxscript", "onnxruntime"), "safetensors": ("safetensors",)}
METADATA = "modip.json"                                     # the key under which each format carries the metadata
TOLERANCE = 1e-4
CHECKED = 1000
BATCHES = (1, 7, 64)                                        # sizes that the check runs, the rest in one: the file must take any


class ExportError(RunError):
    """A policy that cannot be exported, or a file that does not compute what PyTorch does; the message says what to do."""


class RawPolicy(nn.Module):
    """Normaliser and policy in one: what the planner's policy mode computes, with its noise as an argument."""

    def __init__(self, normalizer: Normalizer, policy: DiffusionPolicy | GaussianPolicy, steps: int, samples: int = 1):
        super().__init__()
        self.normalizer, self.policy, self.steps, self.samples = normalizer, policy, steps, samples

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """Of a row's noise: (H, Da), or (n, H, Da) for the mean of n chunks."""
        chunk = self.policy.horizon, self.policy.action_dim
        return chunk if self.samples == 1 else (self.samples, *chunk)

    def forward(self, observation: Tensor, noise: Tensor) -> Tensor:
        """observation (B, Do) as the environment gives it, noise (B, *noise_shape) standard normal -> actions (B, H, Da) as the environment takes them."""
        noise = noise[:, None] if self.samples == 1 else noise
        return self.normalizer.raw_action(self.policy.act(self.normalizer.obs(observation), noise, self.steps))


@dataclass(frozen=True)
class Exported:
    """A written file. difference: the largest one to PyTorch over `checked` observations of the run's data, see `difference`."""

    path: Path
    metadata: dict[str, Any]
    checked: int
    difference: float


def export_run(run: Path, to: Format, out: Path | None = None, mode: PolicyMode = "policy", steps: int | None = None) -> Exported:
    """Write the policy of a run's newest checkpoint and compare the file, read back, with PyTorch.

    mode  : "policy", or "bc", as it was before fine-tuning
    steps : of denoising, which the file has unrolled; default: the run's policy.sampling_steps
    Raises ExportError where the file differs by more than TOLERANCE (it stays, to be looked at), cannot be read back (none stays; a file that was there
    before does), a package is missing, or the policy is one of latents; the run's own errors.
    """
    need_packages(to)
    saved = agent_of_run(run, {"policy.sampling_steps": steps} if steps is not None else {})
    if saved.cfg.method != "modip" and mode == "policy":
        raise ExportError(f"{run}: only the policies of method modip, and BC ones, can be exported; this run's method is {saved.cfg.method}")
    saved.act_as(mode)
    agent = saved.agent.frozen_copy().cpu()
    if isinstance(agent.policy, TunedPolicy):                                       # of method dppo, whose mode is bc here: the plain policy that it began as
        agent.policy = agent.policy.bc
    if isinstance(agent.policy, LatentPolicy):
        raise ExportError(f"{run}: its policy (policy.kind: {saved.cfg.policy.kind}) takes the world model's latents, and a file holds policies of "
                          "observations only; act with it by 'modip serve' or modip_ray.load")
    if isinstance(agent.policy, SteeredPolicy):
        raise ExportError(f"{run}: its policy (policy.kind: dsrl) starts from noise that a second network draws, which a file does not hold; act with it by "
                          "'modip serve' or modip_ray.load")
    observations = data_observations(run, saved.cfg)
    policy = RawPolicy(agent.normalizer, agent.policy, saved.cfg.policy.sampling_steps, saved.cfg.policy.samples).eval()
    metadata = describe(run, saved, mode, policy, observations)
    path = out or run / "export" / f"{saved.cfg.task.name}-{mode}{SUFFIXES[to]}"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial_{path.stem}{SUFFIXES[to]}")
    sample = observations[np.linspace(0, len(observations) - 1, min(CHECKED, len(observations))).round().astype(int)]
    try:
        write(policy, to, partial, metadata)
        try:
            found = difference(policy, load_exported(partial, to), sample)
        except Exception as error:
            raise ExportError(f"{path}: was not written: what was written for it cannot be read back and run ({type(error).__name__}: "
                              f"{first_line(error)}); try another --to, and report the run's config.yaml and `pip list`") from error
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    if not found <= TOLERANCE:
        raise ExportError(f"{path}: its actions differ from PyTorch's by up to {found:.3g} over {len(sample):,} observations of the run's data, allowed is "
                          f"{TOLERANCE:g}; do not use this file, and report the run's config.yaml and `pip list`")
    return Exported(path, metadata, len(sample), found)


def need_packages(to: Format) -> None:
    missing = [name for name in NEEDS[to] if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(f"--to {to} needs {', '.join(missing)}, not installed here: pip install 'modip_ray[export]'")


def data_observations(run: Path, cfg: Config) -> np.ndarray:
    """All observations (T, Do) of the run's offline data."""
    d = cfg.data
    try:
        dataset = read_any(stored_source(cfg, run), max_transitions=d.max_transitions, max_episode_steps=cfg.task.max_episode_steps, filter_key=d.filter_key)
    except DataError as error:
        rows = sorted((run / "offline").glob("rows_*.npy"))                         # what the run made of them
        if not rows:
            raise DataError(f"the export is checked on the run's data, which cannot be read: {error}") from error
        return np.concatenate([mapped(path.resolve(), cfg.critic.gamma).arrays["obs"] for path in rows if not path.name.endswith(".ends.npy")])
    return np.concatenate([e.observations[:-1] for e in dataset.episodes])


def describe(run: Path, saved: SavedAgent, mode: PolicyMode, policy: RawPolicy, observations: np.ndarray) -> dict[str, Any]:
    """What the file says about itself, JSON-ready."""
    cfg, norm, net = saved.cfg, policy.normalizer, policy.policy
    summary = read_summary(run) or {}
    measured = summary.get("env_steps") == saved.env_steps and policy.steps == saved_config(run).policy.sampling_steps      # these weights, acting this way
    scores = {name: s for name, s in summary.get("scores", {}).items() if measured and name in ("data", mode)}
    shown = ("metric", "mean", "ci95", "episodes", "normalized")
    return {
        "task": cfg.task.name, "env": cfg.task.env, "mode": mode,
        "input": {"observation": ["batch", len(norm.obs_mean)], "noise": ["batch", *policy.noise_shape]},
        "output": {"actions": ["batch", net.horizon, net.action_dim]},
        "n_action_steps": cfg.policy.n_action_steps, "max_episode_steps": cfg.task.max_episode_steps, "denoising_steps": policy.steps,
        "samples": policy.samples,
        "observation": {"mean": norm.obs_mean.tolist(), "std": norm.obs_std.tolist(), "clip": norm.clip,
                        "data_low": observations.min(0).tolist(), "data_high": observations.max(0).tolist()},
        "action": {"low": norm.action_low.tolist(), "high": norm.action_high.tolist()},
        "network": {"obs_dim": len(norm.obs_mean), "action_dim": net.action_dim, **{k: getattr(cfg.policy, k) for k in (
            "kind", "horizon", "denoising_steps", "width", "blocks", "parametrization", "network")}},
        "scores": {name: {k: s[k] for k in shown} for name, s in scores.items()},
        "env_steps": saved.env_steps, "checkpoint": saved.version, "config_hash": cfg.hash(), "trained_by": summary.get("git"), "exported_by": git_commit(),
        "versions": versions(),
    }


def write(policy: RawPolicy, to: Format, path: Path, metadata: dict[str, Any]) -> None:
    text = json.dumps(metadata)
    if to == "safetensors":
        from safetensors.torch import save
        path.write_bytes(save(policy.state_dict(), {METADATA: text}))
    elif to == "torch-export":
        torch.export.save(program(policy), path, extra_files={METADATA: text})
    else:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, message=".*LeafSpec.*")          # PyTorch's own
            found = torch.onnx.export(program(policy), dynamo=True, verbose=False, input_names=["observation", "noise"], output_names=["actions"])
        assert found is not None
        found.model.metadata_props[METADATA] = text
        found.save(path)


def program(policy: RawPolicy) -> torch.export.ExportedProgram:
    """The policy as one graph for any number of rows."""
    rows = torch.export.Dim.DYNAMIC
    example = torch.zeros(2, len(policy.normalizer.obs_mean)), torch.zeros(2, *policy.noise_shape)
    with torch.no_grad():
        return torch.export.export(policy, example, dynamic_shapes={"observation": {0: rows}, "noise": {0: rows}}, strict=True)


def load_exported(path: Path, to: Format) -> Run:
    """What the file computes, by the library that its users take."""
    if to == "onnx":
        import onnxruntime
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return lambda obs, noise: session.run(["actions"], {"observation": obs, "noise": noise})[0]
    module = torch.export.load(path).module() if to == "torch-export" else load_safetensors(path)[0]

    def run(obs: np.ndarray, noise: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return module(torch.from_numpy(obs), torch.from_numpy(noise)).numpy()
    return run


def load_safetensors(path: str | Path) -> tuple[RawPolicy, dict[str, Any]]:
    """The policy in plain PyTorch, to run or to train further, and the file's metadata. ExportError where the file is not one of ours."""
    from safetensors import SafetensorError, safe_open
    try:
        with safe_open(path, "pt") as file:
            metadata = json.loads((file.metadata() or {})[METADATA])
            weights = {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, KeyError, ValueError) as error:
        raise ExportError(f"{path}: is not a file of 'modip export --to safetensors' ({type(error).__name__}: {error})") from error
    n = {"kind": "diffusion", **metadata["network"]}
    policy = RawPolicy(Normalizer(n["obs_dim"], n["action_dim"], metadata["observation"]["clip"]), policy_of(**n), metadata["denoising_steps"],
                       metadata.get("samples", 1))
    try:
        policy.load_state_dict(weights)
    except RuntimeError as error:
        raise ExportError(f"{path}: its weights are not those of the network that it describes ({'; '.join(map(str.strip, str(error).splitlines()))[:300]}); "
                          "export the run again") from error
    return policy.eval(), metadata


@torch.inference_mode()
def difference(policy: RawPolicy, run: Run, observations: np.ndarray) -> float:
    """Largest absolute difference of the actions, NaN where any is, over the observations in batches of several sizes; the noise is seeded.

    In halves of the action's range, which for the usual -1..1 are its own units. Both compute in float32, also where the run acts in bfloat16.
    """
    noise = np.random.default_rng(0).standard_normal((len(observations), *policy.noise_shape), np.float32)
    ends = [end for end in np.cumsum(BATCHES).tolist() if end < len(observations)]
    parts = zip(np.split(observations, ends), np.split(noise, ends), strict=True)
    half = ((policy.normalizer.action_high - policy.normalizer.action_low) / 2).numpy()
    return float(np.max([np.abs((run(o, z) - policy(torch.from_numpy(o), torch.from_numpy(z)).numpy()) / half).max() for o, z in parts]))
