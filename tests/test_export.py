"""Exported policies: the same actions as PyTorch, in any batch, without Ray and (but for safetensors) without this package; ONNX without PyTorch."""

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
import torch

from modip_ray import cli, export
from modip_ray.config import load as settings
from modip_ray.export import CHECKED, SUFFIXES, TOLERANCE, ExportError, RawPolicy, data_observations, export_run, load_safetensors
from modip_ray.model.agent import Agent
from modip_ray.policy import agent_of_run, load
from modip_ray.tasks.dataset import DataError

ROOT = Path(__file__).resolve().parents[1]
FORMATS = tuple(SUFFIXES)

BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, *rest):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError(name + " is blocked here")
sys.meta_path.insert(0, Blocked())
import json, numpy
obs, noise = (numpy.load({folder!r} + "/" + name + ".npy") for name in ("obs", "noise"))
"""
LOADERS = {
    "torch-export": """
import torch
more = {{"modip.json": ""}}
program = torch.export.load({path!r}, extra_files=more)
actions, about = program.module()(torch.from_numpy(obs), torch.from_numpy(noise)).numpy(), more["modip.json"]
""",
    "onnx": """
import onnxruntime
session = onnxruntime.InferenceSession({path!r})
actions, about = session.run(None, {{"observation": obs, "noise": noise}})[0], session.get_modelmeta().custom_metadata_map["modip.json"]
""",
    "safetensors": """
import torch
from modip_ray.export import load_safetensors
policy, about = load_safetensors({path!r})
actions, about = policy(torch.from_numpy(obs), torch.from_numpy(noise)).detach().numpy(), json.dumps(about)
""",
}


def raw_policy(*overrides: str, spread: float = 3.0) -> RawPolicy:
    """An untrained policy of an environment with actions in -2..4."""
    torch.manual_seed(0)
    cfg = settings(overrides=["policy.width=16", "policy.blocks=1", "policy.denoising_steps=6", "policy.sampling_steps=4", *overrides])
    agent = Agent(cfg, 3, 2)
    observations = np.random.default_rng(0).normal(1.0, spread, (50, 3)).astype(np.float32)
    agent.normalizer.fit(observations, np.full(2, -2.0), np.full(2, 4.0), 0.01)
    return RawPolicy(agent.normalizer, agent.policy, cfg.policy.sampling_steps, cfg.policy.samples).eval()


@pytest.mark.parametrize("to", FORMATS)
def test_a_file_acts_as_the_run_does_without_ray(tmp_path, finished_run, to):
    """The planner's policy mode on 40 rows, against the file loaded in a process that has no Ray, no package of ours but for safetensors, for ONNX no torch."""
    done = export_run(finished_run, to, tmp_path / f"policy{SUFFIXES[to]}")
    assert done.checked == CHECKED and done.difference <= TOLERANCE
    policy = load(finished_run, overrides={"resources.precision": "fp32"})
    obs = np.random.default_rng(1).normal(size=(40, 4)).astype(np.float32)
    noise = torch.randn((40, 1, 4, 2), generator=torch.Generator().manual_seed(0))[:, 0].numpy()         # what a planner of seed 0 draws
    expected = policy.plan(obs, range(40), np.ones(40, bool)).plans
    np.save(tmp_path / "obs.npy", obs)
    np.save(tmp_path / "noise.npy", noise)
    blocked = {"safetensors": ("ray",), "torch-export": ("ray", "modip_ray"), "onnx": ("ray", "modip_ray", "torch")}[to]
    code = (BLOCKED + LOADERS[to]).format(blocked=blocked, folder=str(tmp_path), path=str(done.path))
    code += f"numpy.save({str(tmp_path / 'actions.npy')!r}, actions)\nprint(about)\n"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT if to == "safetensors" else tmp_path, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert np.abs(np.load(tmp_path / "actions.npy") - expected).max() <= TOLERANCE

    about = json.loads(ran.stdout)
    summary = json.loads((finished_run / "summary.json").read_text())
    assert about["task"] == "point" and about["n_action_steps"] == 2 and about["output"]["actions"] == ["batch", 4, 2]
    assert about["action"] == {"low": [-1, -1], "high": [1, 1]} and len(about["observation"]["data_low"]) == 4
    assert about["scores"].keys() == {"data", "policy"}, "what its own weights were measured at"
    assert about["versions"]["torch"] == metadata.version("torch")
    if to == "torch-export":
        (inside,) = [name for name in ZipFile(done.path).namelist() if name.endswith("/extra/modip.json")]
        assert json.loads(ZipFile(done.path).read(inside)) == about, "as docs/export.md reads it without torch"
    assert about["scores"]["policy"]["mean"] == summary["scores"]["policy"]["mean"] and about["config_hash"] == summary["config_hash"]
    assert about["env_steps"] == summary["env_steps"] and about["checkpoint"].startswith("step_")


@pytest.mark.parametrize(("to", "settings"), [
    ("torch-export", ("policy.network=unet", "policy.parametrization=eps", "policy.horizon=5", "policy.sampling_steps=2")),
    ("onnx", ("policy.network=unet", "policy.parametrization=eps", "policy.horizon=5", "policy.sampling_steps=2")),
    ("onnx", ("policy.sampling_steps=1", "policy.horizon=1", "planner.horizon=1")),
    ("onnx", ("policy.samples=3",)), ("torch-export", ("policy.samples=3",)),
], ids=["unet", "unet, ONNX", "one step, ONNX", "mean, ONNX", "mean"])
def test_any_network_in_any_batch(tmp_path, to, settings):
    policy, path = raw_policy(*settings), tmp_path / f"policy{SUFFIXES[to]}"
    observations = np.random.default_rng(2).normal(1.0, 9.0, (100, 3)).astype(np.float32)                # some beyond the normaliser's clip
    export.write(policy, to, path, {})
    assert export.difference(policy, export.load_exported(path, to), observations) <= TOLERANCE


def test_what_is_exported_is_in_the_environments_units():
    policy = raw_policy()
    actions = policy(torch.full((64, 3), 1e6), torch.randn(64, 4, 2))
    assert actions.shape == (64, 4, 2) and actions.min() >= -2 and actions.max() <= 4 and actions.max() > 1


def test_bc_is_the_policy_before_fine_tuning(tmp_path, finished_run):
    parts = {mode: load_safetensors(export_run(finished_run, "safetensors", tmp_path / mode, mode).path)[0] for mode in ("bc", "policy")}
    saved = agent_of_run(finished_run)
    for mode, vector in (("policy", saved.agent.flat("policy")), ("bc", saved.bc)):
        saved.agent.load_flat(vector, "policy")
        assert all(torch.equal(value, saved.agent.policy.state_dict()[key]) for key, value in parts[mode].policy.state_dict().items())
    assert not torch.equal(parts["bc"].policy.obs_in[0].weight, parts["policy"].policy.obs_in[0].weight)


def test_a_file_that_differs_is_refused_and_kept(tmp_path, finished_run, monkeypatch, capsys):
    real = export.load_exported
    for wrong in (lambda x: x + 2e-4, lambda x: x * np.nan):
        monkeypatch.setattr(export, "load_exported", lambda path, to, wrong=wrong: lambda o, z: wrong(real(path, to)(o, z)))
        out = tmp_path / "policy.safetensors"
        with pytest.raises(SystemExit) as end:
            cli.main(["export", str(finished_run), "--to", "safetensors", "--out", str(out)])
        said = capsys.readouterr().err
        assert end.value.code == 2 and out.is_file() and "differ from PyTorch's" in said and len(said.splitlines()) == 1


def test_a_file_that_cannot_be_read_back_does_not_stay(tmp_path, finished_run, monkeypatch):
    out, folder = tmp_path / "out" / "policy.safetensors", tmp_path / "out"
    folder.mkdir()
    real, good = export.write, raw_policy()
    monkeypatch.setattr(export, "write", lambda policy, to, path, metadata: real(good, to, path, metadata))      # weights of another network
    with pytest.raises(ExportError, match=r"policy.safetensors: was not written: .*its weights are not those of the network that it describes"):
        export_run(finished_run, "safetensors", out)
    assert not list(folder.iterdir())
    out.write_bytes(b"an older one")

    def half(policy, to, path, metadata):
        path.write_bytes(b"half a file")
        raise OSError("no space left on device")
    monkeypatch.setattr(export, "write", half)
    with pytest.raises(OSError, match="no space left"):
        export_run(finished_run, "safetensors", out)
    assert [*folder.iterdir()] == [out] and out.read_bytes() == b"an older one"


def test_mistakes_are_told_in_one_line(tmp_path, finished_run, monkeypatch):
    with pytest.raises(ValueError, match="policy.sampling_steps: got 6, must not exceed"):
        export_run(finished_run, "safetensors", tmp_path / "x", steps=6)
    (tmp_path / "noise.safetensors").write_bytes(b"no such thing")
    with pytest.raises(ExportError, match="is not a file of 'modip export"):
        load_safetensors(tmp_path / "noise.safetensors")
    cfg = agent_of_run(finished_run).cfg
    observations = data_observations(finished_run, cfg)
    monkeypatch.setattr(export, "stored_source", lambda cfg, run: str(tmp_path / "gone.hdf5"))
    np.testing.assert_array_equal(data_observations(finished_run, cfg), observations)               # out of the run's own rows
    with pytest.raises(DataError, match="checked on the run's data, which cannot be read: .*gone.hdf5: no such file"):
        data_observations(tmp_path, cfg)
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r"needs onnx, onnxscript, onnxruntime, not installed here: pip install 'modip_ray\[export\]'"):
        export_run(finished_run, "onnx", tmp_path / "x")
    assert not (tmp_path / "x").exists()
