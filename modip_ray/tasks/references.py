"""What the `d4rl` package says of its tasks: reference scores and dataset addresses. Without the package: what is written in tasks/scores.py.

Only its file infos.py is loaded, which imports nothing: `import d4rl` itself needs mujoco_py, which does not build any more.
"""
from __future__ import annotations

import difflib
import importlib.util
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import ModuleType

PARTS = ("DATASET_URLS", "REF_MIN_SCORE", "REF_MAX_SCORE")


@cache
def infos() -> ModuleType | None:
    """d4rl's infos.py (7 ms), None where d4rl is not installed. A d4rl whose file cannot be used is named in a warning, and is as if not installed."""
    package = importlib.util.find_spec("d4rl")                                      # finds the package without importing it
    if package is None or not package.submodule_search_locations:
        return None
    path = Path(package.submodule_search_locations[0]) / "infos.py"
    spec = importlib.util.spec_from_file_location("d4rl_infos", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        missing = [name for name in PARTS if not isinstance(getattr(module, name, None), Mapping)]
    except Exception as error:                                                      # another project's code: whatever is wrong with it must not stop a run
        missing = [f"{type(error).__name__}: {error}"]
    if missing:
        warnings.warn(f"{path}: cannot be used ({', '.join(missing)}), expected the mappings {', '.join(PARTS)}; the reference scores written here are used. "
                      "d4rl 1.1 is known to work", stacklevel=2)
        return None
    return module


def dataset_of(family: str) -> str:
    """The D4RL dataset whose references stand for a family: all of a family's are equal."""
    return "kitchen-complete-v0" if family == "kitchen" else f"{family}-medium-v2"


def references(written: Mapping[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """(random, expert) by family: d4rl's own where it is installed and has them, else the `written` ones."""
    found = dict(written)
    if (package := infos()) is not None:
        for family in written:
            name = dataset_of(family)
            if name in package.REF_MIN_SCORE and name in package.REF_MAX_SCORE:
                found[family] = (float(package.REF_MIN_SCORE[name]), float(package.REF_MAX_SCORE[name]))
    return found


def dataset_address(name: str) -> str:
    """The address that d4rl itself gives for a dataset name ("hopper-medium-v2"). ValueError when d4rl is not installed or does not know the name."""
    package = infos()
    if package is None:
        raise ValueError(f"the address of {name!r} is in the d4rl package, which is not installed; install it with: pip install d4rl==1.1")
    if name not in package.DATASET_URLS:
        near = difflib.get_close_matches(name, package.DATASET_URLS, 3)
        raise ValueError(f"d4rl has no dataset {name!r}; {'nearest: ' + ', '.join(near) if near else f'it has {len(package.DATASET_URLS)} others'}")
    return package.DATASET_URLS[name]
