import importlib.machinery
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from modip_ray.tasks import references, scores
from modip_ray.tasks.catalogue import catalogue

INSTALLED = importlib.util.find_spec("d4rl") is not None
needs_d4rl = pytest.mark.skipif(not INSTALLED, reason="d4rl is not installed")


@pytest.fixture
def fresh():
    references.infos.cache_clear()
    yield
    references.infos.cache_clear()


def fake_package(monkeypatch, folder: Path, text: str | None):
    """A package d4rl in `folder` whose infos.py holds `text`; its __init__ fails like the real one's. None: no such package."""
    if text is None:
        found = None
    else:
        (folder / "d4rl").mkdir()
        (folder / "d4rl" / "__init__.py").write_text("raise Exception('mujoco_py is missing')")
        (folder / "d4rl" / "infos.py").write_text(text)
        found = importlib.machinery.PathFinder.find_spec("d4rl", [str(folder)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)


@needs_d4rl
def test_written_references_are_the_package_s():
    package = references.infos()
    for family, pair in scores.WRITTEN.items():
        name = references.dataset_of(family)
        assert (package.REF_MIN_SCORE[name], package.REF_MAX_SCORE[name]) == pair
        relatives = [n for n in package.REF_MIN_SCORE if n.startswith(f"{family}-")]
        assert len(relatives) >= 3 and {(package.REF_MIN_SCORE[n], package.REF_MAX_SCORE[n]) for n in relatives} == {pair}     # any of a family will do
    assert scores.REFERENCE == scores.WRITTEN


@needs_d4rl
def test_the_package_itself_is_not_imported():
    code = "import sys; from modip_ray.tasks import references; assert references.infos() is not None; print(*{'d4rl', 'gym', 'mujoco_py'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


@needs_d4rl
def test_catalogue_addresses_are_the_package_s():
    """catalogue "d4rl/hopper_medium_replay-v2" is the package's "hopper-medium-replay-v2"."""
    ours = {name.removeprefix("d4rl/").replace("_", "-"): entry.address for name, entry in catalogue().items() if name.startswith("d4rl/")}
    assert len(ours) >= 15
    assert {name: references.dataset_address(name) for name in ours} == ours


def test_another_d4rl_s_numbers_are_used(monkeypatch, tmp_path, fresh):
    fake_package(monkeypatch, tmp_path, "DATASET_URLS = {'hopper-medium-v2': 'http://example.org/h'}\n"
                                        "REF_MIN_SCORE = {'hopper-medium-v2': 1, 'ant-medium-v2': 5}\nREF_MAX_SCORE = {'hopper-medium-v2': 2}\n")
    written = {"hopper": (0.0, 10.0), "ant": (3.0, 4.0), "kitchen": (0.0, 4.0)}
    assert references.references(written) == {"hopper": (1.0, 2.0), "ant": (3.0, 4.0), "kitchen": (0.0, 4.0)}       # ant: no expert score there
    assert written["hopper"] == (0.0, 10.0)
    assert references.dataset_address("hopper-medium-v2") == "http://example.org/h"
    with pytest.raises(ValueError, match="no dataset 'hoper-medium-v2'; nearest: hopper-medium-v2"):
        references.dataset_address("hoper-medium-v2")
    with pytest.raises(ValueError, match="no dataset 'xyz'; it has 1 others"):
        references.dataset_address("xyz")


def test_without_d4rl_the_written_ones_are_used(monkeypatch, tmp_path, fresh):
    fake_package(monkeypatch, tmp_path, None)
    assert references.references(scores.WRITTEN) == scores.WRITTEN
    with pytest.raises(ValueError, match="'hopper-medium-v2' is in the d4rl package, which is not installed; install it with: pip install d4rl"):
        references.dataset_address("hopper-medium-v2")


@pytest.mark.parametrize(("text", "words"), [
    ("REF_MIN_SCORE = {}\nREF_MAX_SCORE = []\n", "DATASET_URLS, REF_MAX_SCORE"), ("import no_such_module_at_all", "ModuleNotFoundError"),
    ("x = (", "SyntaxError"),
])
def test_a_d4rl_that_cannot_be_used_is_named(monkeypatch, tmp_path, fresh, text, words):
    fake_package(monkeypatch, tmp_path, text)
    with pytest.warns(UserWarning, match=f"infos.py: cannot be used .*{words}.*expected the mappings DATASET_URLS"):
        assert references.references(scores.WRITTEN) == scores.WRITTEN
