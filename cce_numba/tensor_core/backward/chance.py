"""The unbiased filter: which columns of a tile of G survive by chance, and what they are multiplied by.

A consumer has all 128 tokens of a block in its registers, so it knows the largest probability of each of the tile's columns.
Warps find the largest among their tokens, shared memory joins them, and a thread decides for a column. `cce_numba.survivors`
has the rule.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from cce_numba.launch.record import kind_of
from cce_numba.ptx import arithmetic, control, memory
from cce_numba.survivors import make_scale
from cce_numba.tensor_core.backward.records import ListColumns
from cce_numba.tensor_core.draws import draw
from cce_numba.tensor_core.exponentials import LOG2E, exp2, fma
from cce_numba.tensor_core.fragment import change_chunks
from cce_numba.tensor_core.logits import make_logit_of
from cce_numba.tensor_core.records import F32, U32, RowWeights

MAXIMA = 8  # of each column: four warps have 16 of the upper 64 tokens each, and 16 of the lower
INFINITY = np.float32(math.inf)

maximum, shuffle_xor = arithmetic.maximum_or_nan, control.shuffle_xor_f32
scale_of = cuda.jit(device=True, forceinline=True)(make_scale(np.float32))


@functools.cache
def make_find_maxima(n: int, capped: bool, scaled: bool) -> Any:
    """The function `z = find_maxima(x, columns, row_0, row_1, log_sums, softcap, maxima)` for 64 tokens x n columns.

    x, a fragment, holds products of rows of e and of c, without biases; z are logits. To shared memory goes, for each column,
    the largest base-2 logarithm of a probability among the warp's 16 tokens: inf if the column is the target of one of them,
    NaN if one of them is lost. A token without weight has no part in it.

    `columns` is a `ListColumns`. row_0 and row_1 are the `RowWeights` of the thread's two rows, and log_sums what the survey's
    table has for the two. maxima: shared address of the warp's (n,) float32. capped, scaled: see `gradient.make_gradient`.
    """

    logit_of = make_logit_of(capped, scaled)

    @cuda.jit(device=True, forceinline=True)
    def log_probability(z: Any, entry: Any, row: Any, log_sum: Any) -> Any:
        return INFINITY if entry == row.target else fma(z, LOG2E, -row.shift) - log_sum

    @cuda.jit(device=True, forceinline=True)
    def largest_of_warp(x: Any) -> Any:
        """Over the eight lanes that have the same columns."""
        x = maximum(x, shuffle_xor(x, 4))
        x = maximum(x, shuffle_xor(x, 8))
        return maximum(x, shuffle_xor(x, 16))

    def find(
        x: Any, first: Any, columns: Any, row_0: Any, row_1: Any, log_sums: Any, softcap: Any, maxima: Any
    ) -> Any:  # fmt: skip
        """Of the eight columns from `first` on."""
        lane = np.int32(cuda.threadIdx.x & 31)
        place = np.uint32(4 * (first + 2 * (lane & 3)))
        v = memory.load_shared_2_i32_freely(columns.ids + place)
        bias = memory.load_shared_2_f32_freely(columns.biases + place)
        z_00, z_01 = logit_of(x[0] + bias[0], row_0, softcap), logit_of(x[1] + bias[1], row_0, softcap)
        z_10, z_11 = logit_of(x[2] + bias[0], row_1, softcap), logit_of(x[3] + bias[1], row_1, softcap)
        largest_0 = maximum(log_probability(z_00, v[0], row_0, log_sums[0]), log_probability(z_10, v[0], row_1, log_sums[1]))
        largest_1 = maximum(log_probability(z_01, v[1], row_0, log_sums[0]), log_probability(z_11, v[1], row_1, log_sums[1]))
        largest_0, largest_1 = largest_of_warp(largest_0), largest_of_warp(largest_1)
        if lane < 4:
            memory.store_shared_f32(np.uint32(maxima + place), largest_0)
            memory.store_shared_f32(np.uint32(maxima + place + np.uint32(4)), largest_1)
        return z_00, z_01, z_10, z_11

    row, pair = kind_of(RowWeights), types.UniTuple(F32, 2)
    return change_chunks(n, 8, find, kind_of(ListColumns), row, row, pair, F32, U32)


@functools.cache
def make_decide(n: int, threads: int = 128) -> Any:
    """The device function `decide(columns, maxima, chance, block, consumer, thread)`, by a consumer of so many threads.

    Writes what n columns are multiplied by to `columns.scales`, once all of its warps have found their maxima.

    columns: a `ListColumns`. maxima: shared address of (MAXIMA, n) float32, as `find_maxima` writes them. chance: a `Chance`.
    block: the number of the block of listed tokens.
    """

    one_consumer = np.uint32(threads)

    @cuda.jit(device=True, forceinline=True)
    def decide_one(column: Any, columns: Any, maxima: Any, chance: Any, block: Any) -> None:
        if column < n:
            place = np.uint32(4 * column)
            largest = memory.load_shared_f32(np.uint32(maxima + place))
            for k in range(1, MAXIMA):
                largest = maximum(largest, memory.load_shared_f32(np.uint32(maxima + np.uint32(4 * n * k) + place)))
            u = draw(block, memory.load_shared_i32(np.uint32(columns.ids + place)), chance.seed[0])
            memory.store_shared_f32(np.uint32(columns.scales + place), scale_of(exp2(largest), chance.eps, u))

    @cuda.jit(device=True, forceinline=True)
    def decide(columns: Any, maxima: Any, chance: Any, block: Any, consumer: Any, thread: Any) -> None:
        barrier = np.uint32(1 + consumer)
        control.barrier_sync(barrier, one_consumer)
        decide_one(thread, columns, maxima, chance, block)
        decide_one(np.int32(thread + threads), columns, maxima, chance, block)
        control.barrier_sync(barrier, one_consumer)

    return decide
