"""What the other kernels need, made on the device in one launch: the list of tokens that count, and tensor maps in memory."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from cce_numba.arguments import Problem
from cce_numba.hopper.tensor_map import WORDS
from cce_numba.launch.kernel import Kernel, kernel_factory, pointer_to

_THREADS = 1024
_TOKENS = 8  # neighbours, of each thread


@kernel_factory
def make_prepare_kernel() -> Kernel:
    """One CTA."""
    threads, tokens_per_thread, warps, words = _THREADS, _TOKENS, _THREADS // 32, WORDS

    def prepare_kernel(
        e_map: Any,  # 16 words
        c_map: Any,
        maps: Any,  # (32,) words
        targets: Any,  # (N,)
        has_targets: Any,
        ignore_index: Any,
        N: Any,
        tokens: Any,  # (N,)
        n_valid: Any,  # (1,)
        target_logit: Any,  # (N,)
        lse: Any,  # (N,)
    ) -> None:
        """maps = e_map, c_map; tokens[:n_valid[0]] = those with target != ignore_index, ascending; 0 for results of others."""
        warp_counts = cuda.shared.array(warps, np.int32)
        t = cuda.threadIdx.x
        lane, warp = t & 31, t >> 5
        if t < words:
            maps[t] = e_map[t]
            maps[words + t] = c_map[t]
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
                        target_logit[n] = np.float32(-math.inf)  # as a bound of the log-sum-exp
                else:
                    lse[n] = np.float32(0)
                    target_logit[n] = np.float32(0)
            cuda.syncthreads()
        if t == 0:
            n_valid[0] = listed

    p_i64, p_i32, p_f32 = pointer_to(np.int64), pointer_to(np.int32), pointer_to(np.float32)
    i32, i64, tensor_map = types.int32, types.int64, types.UniTuple(types.uint64, WORDS)
    signature = types.void(
        tensor_map, tensor_map, pointer_to(np.uint64), p_i64, i32, i64, i32, p_i32, p_i64, p_f32, p_f32
    )  # fmt: skip
    return Kernel(prepare_kernel, signature, threads=_THREADS)


def launch_prepare(
    p: Problem,
    e_map: tuple[int, ...],
    c_map: tuple[int, ...],
    maps: int,
    tokens: int,
    n_valid: int,
    target_logit: int,
    lse: int,
) -> None:
    """Lists the tokens of p, and writes the maps; all but the maps themselves are addresses."""
    targets = 0 if p.targets is None else p.targets.data.ptr
    make_prepare_kernel().launch(
        1, *e_map, *c_map, maps, targets, targets != 0, p.options.ignore_index, p.N, tokens, n_valid, target_logit, lse
    )
