import gc
import os
import subprocess
import sys

import torch

from modip_ray.model.hardware import beside, compiled, go_on, prepare_process

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
