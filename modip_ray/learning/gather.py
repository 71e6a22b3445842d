"""Sequences out of the ring, compiled: one pass over the batch that reads each row once. Importing this compiles, or loads what was compiled before.

The rows of a batch lie at random places of a memory much larger than the caches, so most of the time would be spent waiting for it: while one sequence is
copied, those `AHEAD` of it are already asked for. Symbols as in replay.py: B rows, H horizon, K = H + 1, Do / Da sizes, F numbers a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

AHEAD = 4
LINE = 16                           # float32 numbers of a cache line
U = np.uint64                       # an index that cannot be negative needs no check for that, and loops over it become vector instructions


@intrinsic
def prefetch(context: Any, array: Any, row: Any, column: Any) -> tuple[Any, Callable[..., Any]]:
    """prefetch(array (n, m), row, column): ask for the cache line of an element, without waiting for it. LLVM's own instruction."""
    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = signature.args[0]
        data = context.make_array(kind)(context, builder, arguments[0])
        at = cgutils.get_item_pointer(context, builder, kind, data, list(arguments[1:]), wraparound=False, boundscheck=False)
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        function = builder.module.declare_intrinsic("llvm.prefetch", [byte], ir.FunctionType(ir.VoidType(), [byte, number, number, number]))
        builder.call(function, [builder.bitcast(at, byte), number(0), number(3), number(1)])     # to read, to be kept, data
        return context.get_dummy_value()
    return types.void(array, row, column), code


def gather(steps, whole, start, n_step, powers, end_obs, end_terminated, obs, bootstrap, action, reward, terminated, mask, value_mask, returns, discount):
    """What `ReplayBuffer.sequences` describes, into obs .. discount.

    steps (N, F) float32 with the columns obs, action, reward, suffix, remaining, end; whole: the same memory as int32; start (B,) positions;
    n_step (B,); powers: gamma^n for n up to the largest; end_obs (m, Do), end_terminated (m,); obs, bootstrap (B, K * Do), action (B, H * Da), the rest
    (B, H) or (B, K).
    """
    n_rows, b_rows, k_steps, horizon = U(steps.shape[0]), U(returns.shape[0]), U(returns.shape[1]), U(reward.shape[1])
    d_obs = U(end_obs.shape[1])
    reward_at = U(steps.shape[1] - 4)
    suffix_at, remaining_at, end_at, d_action = reward_at + U(1), reward_at + U(2), reward_at + U(3), reward_at - d_obs
    flat, width = steps.reshape(1, steps.size), U(steps.shape[1])
    for b in range(b_rows):
        if b + U(AHEAD) < b_rows:
            for first in (start[b + U(AHEAD)], start[b + U(AHEAD)] + n_step[b + U(AHEAD)]):
                at, last = first * width, min((first + k_steps) * width + U(LINE - 1), U(flat.size))
                while at < last:                                                    # every line that holds some of these K rows
                    prefetch(flat, U(0), at)
                    at += U(LINE)
        s = start[b]
        remaining, end = U(whole[s, remaining_at]), U(whole[s, end_at])
        dies = end_terminated[end]
        for k in range(k_steps):
            step = min(k, remaining - U(1))                                         # stays inside the segment
            n = min(n_step[b], remaining - step)                                       # steps really summed
            here, there = s + step, s + step + n                                    # there: where the n steps lead
            if here >= n_rows:
                here -= n_rows
            if there >= n_rows:
                there -= n_rows
            column = k * d_obs
            if k == remaining:                                                      # the true observation behind the segment's last action
                for j in range(d_obs):
                    obs[b, column + j] = end_obs[end, j]
            else:
                for j in range(d_obs):
                    obs[b, column + j] = steps[here, j]
            if remaining - step > n:
                for j in range(d_obs):
                    bootstrap[b, column + j] = steps[there, j]
                returns[b, k] = steps[here, suffix_at] - powers[n] * steps[there, suffix_at]
                discount[b, k] = powers[n]
            else:
                for j in range(d_obs):
                    bootstrap[b, column + j] = end_obs[end, j]
                returns[b, k] = steps[here, suffix_at]
                discount[b, k] = np.float32(0) if dies else powers[n]
            value_mask[b, k] = np.float32(k < remaining)
            if k < horizon:
                for j in range(d_action):
                    action[b, k * d_action + j] = steps[here, d_obs + j]
                reward[b, k] = steps[here, reward_at]
                terminated[b, k] = dies and k + U(1) == remaining
                mask[b, k] = np.float32(k < remaining)


FLAT, BOOLS, INDEX = types.float32[:, ::1], types.boolean[:, ::1], types.uint64
ROWS, WHOLE = (types.Array(t, 2, "C", readonly=True) for t in (types.float32, types.int32))         # offline data are mapped read-only
SIGNATURE = types.void(ROWS, WHOLE, INDEX[::1], INDEX[::1], types.float32[::1], FLAT, types.boolean[::1], FLAT, FLAT, FLAT, FLAT, BOOLS, FLAT, FLAT, FLAT, FLAT)
try:
    gather = njit(SIGNATURE, cache=True, nogil=True)(gather)
except RuntimeError:                # nowhere to keep the compiled code: neither beside this file nor in the user's cache
    gather = njit(SIGNATURE, nogil=True)(gather)
