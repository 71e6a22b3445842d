"""For the runs of rival methods."""

import pytest
import torch

from modip_ray.model import hardware


@pytest.fixture
def traced(monkeypatch, capsys):
    """What is compiled is traced whole, its backward pass too, but not turned into machine code, which takes most of a minute a run
    (tests/learning/test_learner.py does that).

    At the end nothing may have run uncompiled.
    """
    compile_, kept = torch.compile, []

    def trace(function, fullgraph, options):
        kept.append(compile_(function, fullgraph=fullgraph, backend="aot_eager"))
        return kept[-1]
    monkeypatch.setattr(torch, "compile", trace)
    monkeypatch.setattr(hardware, "_told", set())
    yield kept
    assert "uncompiled" not in capsys.readouterr().err
