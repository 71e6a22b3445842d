"""Against a checkout of TD-MPC2 (github.com/nicklashansen/tdmpc2) that the user has: one plan and one update at its 5 M parameter shapes, by turns.

Its own code runs uncompiled on the CPU. For that its text is read with "cuda:0" as "cpu" and without Adam's `capturable`, which is for CUDA graphs;
what it imports for its command line (hydra, omegaconf) is replaced by empty modules. tensordict must be installed.
Ours has its latent and widths (512), horizon 3, 5 critics, 512 candidates in 6 iterations, batch 256.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modip_ray.bench.rows import ACTION_DIM, OBS_DIM, Row, Setting, compared
from modip_ray.config import Config, ConfigError
from modip_ray.learning.learner import Learner
from modip_ray.planning.compiled import CompileBeside
from modip_ray.planning.planner import Planner

SHAPES = {"world_model.latent": 512, "world_model.width": 512, "world_model.horizon": 3, "world_model.batch_size": 256, "critic.width": 512,
          "critic.members": 5, "planner.horizon": 3, "planner.proposals": 24, "planner.gaussian": 488, "planner.elites": 64, "planner.iterations": 6}
NOT_NEEDED = ("hydra", "hydra.utils", "omegaconf")
ON_CPU = {"cuda:0": "cpu", "capturable=True": "capturable=False", "WorldModel(cfg).to(self.device)": "WorldModel(cfg)"}     # it is there already
COMPILE_S = 300.0
THEIRS = "TD-MPC2's {}, float32, not compiled"


def checkout(path: Path) -> Path:
    """The folder with tdmpc2.py in it; ConfigError where there is none."""
    for folder in (path, path / "tdmpc2"):
        if (folder / "tdmpc2.py").is_file() and (folder / "common" / "world_model.py").is_file():
            return folder
    raise ConfigError(f"--against {path}: holds no tdmpc2.py beside common/world_model.py; give a checkout of TD-MPC2")


class OnCpu(importlib.abc.MetaPathFinder, importlib.abc.SourceLoader):
    """Imports `tdmpc2` and `common` from the checkout, their text made to run on a CPU."""

    def __init__(self, folder: Path):
        self.folder = folder

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.split(".")[0] not in ("tdmpc2", "common"):
            return None
        base = self.folder.joinpath(*name.split("."))
        file = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
        return importlib.util.spec_from_file_location(name, file, loader=self, submodule_search_locations=[str(base)] if base.is_dir() else None)

    def get_filename(self, name: str) -> str:
        base = self.folder.joinpath(*name.split("."))
        return str(base / "__init__.py" if base.is_dir() else base.with_suffix(".py"))

    def get_data(self, path: str) -> bytes:
        text = Path(path).read_text()
        for theirs, here in ON_CPU.items():
            text = text.replace(theirs, here)
        return text.encode()


def tdmpc2_agent(path: Path) -> Any:
    """Its agent at 5 M parameters, from its own config.yaml."""
    import yaml
    folder = checkout(path)
    for name in NOT_NEEDED:
        sys.modules.setdefault(name, types.ModuleType(name))
    sys.modules["omegaconf"].OmegaConf = object
    finder = OnCpu(folder)
    sys.meta_path.insert(0, finder)
    try:
        common, module = importlib.import_module("common"), importlib.import_module("tdmpc2")
    except ModuleNotFoundError as error:
        raise ConfigError(f"--against {path}: TD-MPC2 needs the package {error.name!r}, which is not installed") from error
    finally:
        sys.meta_path.remove(finder)
    cfg = yaml.safe_load((folder / "config.yaml").read_text()) | common.MODEL_SIZE[5]
    cfg = {k: 3e-4 if k == "lr" else v for k, v in cfg.items()} | {
        "multitask": False, "task_dim": 0, "tasks": ["cheetah-run"], "obs_shape": {"state": (OBS_DIM,)}, "action_dim": ACTION_DIM, "episode_length": 1000,
        "bin_size": (cfg["vmax"] - cfg["vmin"]) / (cfg["num_bins"] - 1), "compile": False, "entropy_coef": 1e-4}
    with contextlib.redirect_stdout(sys.stderr):
        return module.TDMPC2(types.SimpleNamespace(**cfg, get=cfg.get))


def at_its_shapes(cfg: Config, **dotted: object) -> Config:
    return cfg.replace(SHAPES | {k.replace("__", "."): v for k, v in dotted.items()})


def against(s: Setting, path: Path, what: str) -> list[Row]:
    """Rows of planner or learner."""
    theirs = tdmpc2_agent(path)
    return planner(s, theirs) if what == "planner" else learner(s, theirs)


def planner(s: Setting, theirs: Any) -> list[Row]:
    """One observation a call, as TD-MPC2 plans; and the same of our own code in float32, uncompiled."""
    obs, reset = np.random.default_rng(0).standard_normal((1, OBS_DIM), dtype=np.float32), np.zeros(1, bool)
    eager, fast = (Planner(at_its_shapes(s.cfg, resources__precision=p), Setting(at_its_shapes(s.cfg), s.seconds).agent) for p in ("fp32", "bf16"))
    if s.cfg.resources.compile is not False:
        CompileBeside(fast.search).thread.join(COMPILE_S)

    def plan_theirs() -> None:
        with torch.no_grad():
            theirs._plan(torch.from_numpy(obs))
    ours, slow, reference = s.medians(lambda: fast.plan(obs, [0], reset), lambda: eager.plan(obs, [0], reset), plan_theirs)
    return [compared("planner.vs_tdmpc2", 1 / ours, "plans/s", 1 / reference, THEIRS.format("_plan, 512 candidates, 6 iterations") + "; ours bf16, compiled"),
            compared("planner.vs_tdmpc2.own_eager_fp32", 1 / ours, "plans/s", 1 / slow, "our own planner in float32, not compiled")]


def learner(s: Setting, theirs: Any) -> list[Row]:
    """One update of world model and critic, and of the policy, against TD-MPC2's update of world model, Q and its Gaussian policy."""
    setting = Setting(at_its_shapes(s.cfg, resources__compile=s.cfg.resources.compile is not False), s.seconds)
    ours, model, policy = Learner(setting.cfg, setting.agent), setting.model_batch(), setting.policy_batch()
    h, b = theirs.cfg.horizon, theirs.cfg.batch_size
    batch = (torch.randn(h + 1, b, OBS_DIM), torch.rand(h, b, ACTION_DIM) * 2 - 1, torch.randn(h, b, 1), torch.zeros(h, b, 1))

    both, only_model, reference = s.medians(lambda: (ours.update_model(model), ours.update_policy(policy, distil=True)),
                                            lambda: ours.update_model(model), lambda: theirs._update(*batch))
    return [compared("learner.vs_tdmpc2", 1 / both, "updates/s", 1 / reference, THEIRS.format("_update, batch 256") + "; ours compiled, with the policy's"),
            compared("learner.vs_tdmpc2.model_only", 1 / only_model, "updates/s", 1 / reference, THEIRS.format("_update") + "; ours without the policy's")]
