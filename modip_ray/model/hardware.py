"""What depends on the device: precision of matrix products, compilation, generators."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch._functorch import config as functorch

from modip_ray.config import Config
from modip_ray.oneline import first_line

COMPILE_FROM = 200_000              # updates of a run that repay about a minute of compiling

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3                                         # of glibc's malloc.h
MMAP_FROM, TRIM_FROM = 2**25, 2**29                                                 # bytes: the most that glibc takes for the first; free memory kept

_told: set[str] = set()


def prepare_process(threads: int) -> None:
    """What every process that computes does first: so many threads, and memory that stays.

    Memory: have the C library keep what tensors free, for the next ones, instead of giving it back to the system: an update or a plan would otherwise
    have thousands of pages mapped and cleared again. glibc only; elsewhere nothing changes.
    """
    torch.set_num_threads(threads)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, MMAP_FROM)
        mallopt(M_TRIM_THRESHOLD, TRIM_FROM)


def uses_bf16(precision: str, device: torch.device) -> bool:
    """fp32, bf16, or auto: bfloat16 where the device has instructions for its products, elsewhere they would be slower than float32's."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    can = torch.cpu.get_capabilities()
    return bool(can.get("avx512_bf16") or can.get("amx_bf16"))


def uses_compile(cfg: Config) -> bool:
    """Decided by the settings alone, never by the clock: in one process the same settings give the same results, also after a resume."""
    if cfg.resources.compile != "auto":
        return bool(cfg.resources.compile)
    online = cfg.online.updates_per_step * cfg.online.env_steps
    return cfg.pretrain.updates + online >= COMPILE_FROM


def compiled(function: Callable[..., Any], what: str) -> Callable[..., Any]:
    """torch.compile of one whole graph; where this machine cannot compile, the function itself, with one line on stderr at the first call.

    Weights are read where they lie, so that they may be loaded in place at any time; the guards leave modules out, as a call would
    otherwise spend more on them than on a small product.
    """
    fast = torch.compile(function, fullgraph=True, options={"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe})
    backward_too = functorch.patch(force_non_lazy_backward_lowering=True)           # its errors show here; one for all calls: torch never frees a patch
    works = True

    def call(*args: Any) -> Any:
        nonlocal works
        if works:
            try:
                with backward_too:
                    return fast(*args)
            except compile_errors() as error:
                works = False
                tell(f"modip: {what} runs uncompiled: {type(error).__name__}: {first_line(error)}")
        return function(*args)
    return call


def beside(work: Callable[[], None], what: str) -> threading.Thread:
    """Compile in a thread of its own; where this machine cannot, one line on stderr says so and `what` stays as it is."""
    threads = torch.get_num_threads()                                               # a thread's own number, and what the code is compiled for

    def run() -> None:
        torch.set_num_threads(threads)
        try:
            work()
        except Exception as error:                                                  # noqa: BLE001 - said, and what it was for goes on without it
            tell(f"modip: {what} stays uncompiled: {type(error).__name__}: {first_line(error)}")
    thread = threading.Thread(target=run, name=f"compile {what}", daemon=True)
    thread.start()
    return thread


def compiled_beside(function: Callable[..., Any], what: str) -> Callable[..., Any]:
    """As `compiled`, but nobody waits: calls run uncompiled until a thread, begun by the first of them, has compiled the function for such arguments.

    When that is done is for the clock to say, so two runs with the same settings differ in the last digits.
    """
    now, thread = function, None

    def compile_for(args: tuple[Any, ...]) -> None:
        nonlocal now
        fast = compiled(function, what)
        fast(*args)
        now = fast

    def call(*args: Any) -> Any:
        nonlocal thread
        if thread is None:
            thread = beside(partial(compile_for, args), what)
        return now(*args)
    return call


def compile_errors() -> tuple[type[Exception], ...]:
    """What torch.compile raises where it cannot do it: no compiler, a compiler that fails, or an operation that it does not know."""
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError
    return TorchDynamoException, InductorError


def tell(line: str) -> None:
    """A line on stderr, once."""
    if line not in _told:
        _told.add(line)
        print(line, file=sys.stderr, flush=True)


def go_on(rng: torch.Generator, state: np.ndarray, seed: int) -> None:
    """Have a generator go on from a saved state; one on another kind of device, whose states are others, begins anew with `seed`."""
    saved = torch.from_numpy(np.array(state))
    if saved.shape == rng.get_state().shape:
        rng.set_state(saved)
    else:
        rng.manual_seed(seed)
