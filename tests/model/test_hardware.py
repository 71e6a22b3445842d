import gc
import os
import subprocess
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from modip_ray.config import ConfigError
from modip_ray.learning.build import device_of
from modip_ray.model.hardware import beside, compiled, go_on, prepare_process
from tests.fakes import small

SCRIPT = """
import resource, sys, torch
from modip_ray.model.hardware import prepare_process
prepare_process(1) if sys.argv[1] == "keep" else torch.set_num_threads(1)
def work():                                                       # activations of an update, all freed again
    found = [torch.ones(1000, 1024) for _ in range(8)]
for _ in range(3):
    work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    work()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 20)
"""


def test_memory_that_tensors_free_is_kept_for_the_next_ones():
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}    # glibc's first values, which it else moves by what it sees
    freed, kept = (float(subprocess.run([sys.executable, "-c", SCRIPT, how], check=True, capture_output=True, text=True, env=env).stdout)
                   for how in ("free", "keep"))
    assert kept < 10 < freed                                        # pages mapped anew for each piece of work


def test_the_device_of_a_role_is_the_one_that_ray_gave_it(monkeypatch):
    """Ray shows a process its own GPU alone, so there cuda:1 does not exist."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    found = {(asked, gpus): str(device_of(small(resources__device=asked), gpus)) for asked in ("auto", "cpu", "cuda", "cuda:1") for gpus in (None, 0, 0.5)}
    assert found == {("auto", None): "cuda", ("auto", 0): "cpu", ("auto", 0.5): "cuda", ("cpu", None): "cpu", ("cpu", 0): "cpu", ("cpu", 0.5): "cpu",
                     ("cuda", None): "cuda", ("cuda", 0): "cpu", ("cuda", 0.5): "cuda", ("cuda:1", None): "cuda:1", ("cuda:1", 0): "cpu",
                     ("cuda:1", 0.5): "cuda"}
    with pytest.raises(ConfigError, match="resources.device: got 'cuda:2', but this machine has 2 CUDA device"):
        device_of(small(resources__device="cuda:2"))


@pytest.mark.parametrize("before, asked, seen", [(None, "cuda:1", "1"), ("5,7", "cuda:1", "7"), ("5,7", "cuda", "5,7"), (None, "cpu", None)])
def test_a_server_takes_the_gpu_that_is_asked_for(monkeypatch, tmp_path, before, asked, seen):
    """Ray deals out the first GPU that it sees; the replica takes whichever it was given."""
    from ray import serve

    from modip_ray.serve import app, start
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", before) if before is not None else monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    told = []

    @contextmanager
    def private_ray(variables, **settings):
        told.append((os.environ.get("CUDA_VISIBLE_DEVICES"), settings["num_gpus"]))
        yield
    monkeypatch.setattr(start, "private_ray", private_ray)
    monkeypatch.setattr(start, "load", lambda *args: SimpleNamespace(cfg=small(resources__device=asked)))
    monkeypatch.setattr(start, "device_of", lambda cfg: torch.device(asked))
    monkeypatch.setattr(serve, "start", lambda **settings: None)
    monkeypatch.setattr(serve, "run", lambda application, **settings: told.append(application))
    monkeypatch.setattr(app.serve, "deployment", lambda cls, **settings: SimpleNamespace(bind=lambda run, mode, overrides, *more: (overrides, settings)))
    with start.served(tmp_path, port=0):
        pass
    gpus = 0.0 if asked == "cpu" else 1.0
    assert told[0] == (seen, gpus or None) and told[1][0] == ({"resources.device": "cuda"} if gpus else {})
    assert told[1][1]["ray_actor_options"]["num_gpus"] == gpus and os.environ.get("CUDA_VISIBLE_DEVICES") == before


def test_the_number_of_threads_is_set():
    before = torch.get_num_threads()
    try:
        prepare_process(before + 1)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_where_nothing_can_be_compiled_the_plain_function_runs_and_says_so_once():
    """In a process of its own: torch keeps what it found out about the compiler for the life of one."""
    script = """import contextlib, io, torch
from modip_ray.model.hardware import compiled
function, x = compiled(lambda x: (2 * x).sin(), "the test"), torch.ones(3)
with contextlib.redirect_stderr(io.StringIO()) as said:
    assert all(torch.equal(function(x), (2 * x).sin()) for _ in range(2))
print(said.getvalue(), end="")"""
    env = os.environ | {"CXX": "/no/such/compiler", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    said = subprocess.run([sys.executable, "-W", "ignore", "-c", script], env=env, check=True, capture_output=True, text=True).stdout
    assert said.count("modip: the test runs uncompiled: ") == 1 and said.count("\n") == 1, said


def test_what_cannot_be_compiled_beside_runs_on_as_it_is(capsys):
    def refuse():
        raise RuntimeError("no compiler here")
    beside(refuse, "the test").join(60)
    assert capsys.readouterr().err == "modip: the test stays uncompiled: RuntimeError: no compiler here\n"


def test_calls_of_compiled_code_leave_nothing_in_memory():
    """torch keeps each new patch of its settings for good: three objects a call, 20 MB an hour in a planner."""
    double, x = compiled(lambda x: (2 * x).sum(), "the test"), torch.ones(4, requires_grad=True)
    for _ in range(1000):                                                           # the first ones fill caches
        double(x)
    gc.collect()
    before = sys.getallocatedblocks()
    for _ in range(1000):
        double(x)
    gc.collect()
    assert sys.getallocatedblocks() - before < 1000


def test_a_generator_goes_on_where_it_was_and_begins_anew_on_another_kind_of_device():
    def drawn(rng):
        return torch.rand(5, generator=rng).tolist()
    saved = torch.Generator().manual_seed(1)
    state = saved.get_state().numpy()
    first = drawn(saved)
    go_on(rng := torch.Generator(), state, seed=3)
    assert drawn(rng) == first
    go_on(rng, state[:16], seed=3)                                  # as long as CUDA's
    assert drawn(rng) == drawn(torch.Generator().manual_seed(3)) != first
