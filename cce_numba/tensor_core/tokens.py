"""The list of tokens that count, made on the device: kernels take their rows from it, so ignored tokens cost nothing."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from cce_numba.arguments import Problem
from cce_numba.launch.kernel import Kernel, kernel_factory, pointer_to
from cce_numba.ptx import memory
from cce_numba.survivors import SURVIVOR_BLOCK
from cce_numba.tensor_core.records import I32, I64, U64, Found

_THREADS = 1024
_TOKENS = 8  # neighbours, of each thread


@cuda.jit(device=True, forceinline=True)
def token_at(tokens: Any, position: Any) -> Any:
    """The row of e at a position of the list; tokens: the address of a list of int32."""
    return memory.load_global_i32(tokens + np.uint64(4 * position))


@cuda.jit(device=True, forceinline=True)
def are_neighbours(tokens: Any, n0: Any, listed: Any) -> Any:
    """Whether the block of 128 tokens from position n0 on (or as many as are listed) are consecutive rows of e.

    tokens: the address of a list of int32.
    """
    last = np.int32(min(n0 + SURVIVOR_BLOCK - 1, listed - 1))
    first_row, last_row = token_at(tokens, n0), token_at(tokens, last)
    return last_row - first_row == last - n0


@kernel_factory
def make_list_tokens_kernel(n_constants: int = 0) -> Kernel:
    """The kernel: one CTA. On its way it writes `n_constants` 64-bit words to memory, for kernels that must read them there."""
    threads, tokens_per_thread, warps = _THREADS, _TOKENS, _THREADS // 32

    def list_tokens_kernel(
        constants: Any,  # n_constants words
        constants_to: Any,  # (n_constants,)
        targets: Any,  # (N,)
        has_targets: Any,
        ignore_index: Any,
        N: Any,
        tokens: Any,  # (N,)
        n_valid: Any,  # (1,)
        found: Found,
        n_results: Any,
    ) -> None:
        """tokens[:n_valid[0]] = those whose target is not ignore_index, ascending. Results of all others become 0."""
        warp_counts = cuda.shared.array(warps, np.int32)
        t = cuda.threadIdx.x
        lane, warp = t & 31, t >> 5
        if n_constants > 0 and t < n_constants:
            constants_to[t] = constants[t]
        listed = np.int32(0)  # so far
        for first in range(0, N, threads * tokens_per_thread):
            n0 = first + t * tokens_per_thread
            count = np.int32(0)
            for n in range(n0, min(n0 + tokens_per_thread, N)):
                if not has_targets or targets[n] != ignore_index:
                    count += np.int32(1)
            # Sums over the threads before this one: within the warp, then over the warps before.
            position = count
            for step in (1, 2, 4, 8, 16):
                before = cuda.shfl_up_sync(0xFFFFFFFF, position, step)
                if lane >= step:
                    position += before
            if lane == 31:
                warp_counts[warp] = position
            cuda.syncthreads()
            position += listed - count
            for other in range(warps):
                if other < warp:
                    position += warp_counts[other]
                listed += warp_counts[other]
            for n in range(n0, min(n0 + tokens_per_thread, N)):
                if not has_targets or targets[n] != ignore_index:
                    tokens[position] = n
                    position += np.int32(1)
                    if not has_targets:
                        found.target_logit[n] = np.float32(-math.inf)  # as a bound of the log-sum-exp
                else:
                    found.target_logit[n] = np.float32(0)
                    for k in range(n_results):
                        found.results[k * found.pitch + n] = np.float32(0)
            cuda.syncthreads()
        if t == 0:
            n_valid[0] = listed

    p_i64, p_i32 = pointer_to(np.int64), pointer_to(np.int32)
    parameters = types.UniTuple(U64, n_constants), pointer_to(np.uint64), p_i64, I32, I64, I32, p_i32, p_i64, Found, I32
    return Kernel(list_tokens_kernel, parameters, threads=_THREADS)


def list_tokens(
    p: Problem, tokens: int, n_valid: int, found: Found, n_results: int, constants: tuple[int, ...] = (), constants_to: int = 0
) -> None:
    """Lists the tokens of p that count; tokens (N,) int32, n_valid (1,) int64 and constants_to are addresses."""
    targets = 0 if p.targets is None else p.targets.data.ptr
    make_list_tokens_kernel(len(constants)).launch(
        1, constants, constants_to, targets, targets != 0, p.options.ignore_index, p.N, tokens, n_valid, found, n_results
    )
