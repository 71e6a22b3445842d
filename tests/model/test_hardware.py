import os
import subprocess
import sys

import torch

from modip_ray.model.hardware import prepare_process

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
