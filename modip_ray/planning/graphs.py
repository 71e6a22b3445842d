"""A search in a few sizes only, each recorded once as a CUDA graph and replayed: a plan is some hundred small kernels, and starting them one by
one takes a GPU longer than their work. Rows are padded to the next size; a row's plan does not depend on the rows beside it.

Weights are loaded in place, so a recorded graph plans with the newest ones. Not used on a CPU, where a padded row costs as much as a real one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from modip_ray.planning.search import Found, Noise, Search

LEAST_ROWS = 8
WARM_UP = 2                         # calls before recording: they load kernels and choose algorithms

Run = Callable[[], Found]


def bucket(rows: int) -> int:
    """Rows after padding: the next power of two, at least LEAST_ROWS."""
    return max(LEAST_ROWS, 1 << (rows - 1).bit_length())


def cuda_graph(run: Run) -> Run:
    """Records what `run` does on the device; calling the result does it again with whatever its tensors hold by then."""
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):                # the compiler may be at work in its own thread
        found = run()

    def replay() -> Found:
        graph.replay()
        return found
    return replay


class Buckets:
    """Called like the `Search` it wraps. What it returns is overwritten by its next call. `record`: see `cuda_graph`."""

    def __init__(self, search: Search, record: Callable[[Run], Run] = cuda_graph):
        self.search, self.record = search, record
        self.recorded: dict[int, tuple[list[Tensor], Run]] = {}
        self.of: tuple[object, ...] = ()

    def __call__(self, s: Tensor, noise: Noise, warm: Tensor, has_warm: Tensor, limits: Tensor) -> Found:
        rows, inputs = len(s), [s, *noise, warm, has_warm]
        if self.of != (self.search.agent, self.search.rollout):                     # another module, or compiled parts in place of plain ones
            self.recorded, self.of = {}, (self.search.agent, self.search.rollout)
        size = bucket(rows)
        if size not in self.recorded:
            self.recorded[size] = self.prepare([x.new_zeros(size, *x.shape[1:]) for x in inputs], limits.clone())
        buffers, run = self.recorded[size]
        for buffer, x in zip(buffers, [*inputs, limits], strict=True):
            buffer[:len(x)].copy_(x)
        return Found(*(x[:rows] for x in run()))

    def prepare(self, padded: list[Tensor], limits: Tensor) -> tuple[list[Tensor], Run]:
        s, start, gaussian, warm, has_warm = padded
        return [*padded, limits], self.record(lambda: self.search(s, Noise(start, gaussian), warm, has_warm, limits))
