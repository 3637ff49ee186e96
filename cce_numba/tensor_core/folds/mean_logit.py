"""The sum over the vocabulary of class weight times logit, for label smoothing under a softcap (`cce_numba.terms`)."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from cce_numba import folds
from cce_numba.launch.record import Record
from cce_numba.ptx import arithmetic, control, memory
from cce_numba.tensor_core.folds.chain import Fold
from cce_numba.tensor_core.fragment import fold_columns
from cce_numba.tensor_core.quads import quad_sum
from cce_numba.tensor_core.records import F32
from cce_numba.tensor_core.tokens import token_at

_WARPGROUP = 128  # threads
_FIRST_BARRIER = 2  # of consumer 0; its own barriers follow each other


class Totals(Record):
    """Of a pair of rows: the sums of class weight times logit over this lane's columns."""

    total_0 = F32
    total_1 = F32


def kept_weight(column: Any, columns_smem: Any) -> Any:
    """The class weight of a tile's column."""
    return memory.load_shared_f32_freely(np.uint32(columns_smem + np.uint32(4 * column)))


def add_weighted(so_far: Any, z: Any, weight: Any) -> Any:
    """so_far + weight * z; so_far where the weight is 0, whatever the logit is: padding is -inf."""
    return arithmetic.fma(z, weight, so_far) if weight != np.float32(0) else so_far


@functools.cache
def make(n: int) -> SimpleNamespace:
    """See `tensor_core.folds`."""
    add_row_totals = fold_columns(n, kept_weight, add_weighted, types.uint32)
    opaque = arithmetic.opaque_u32

    @cuda.jit(device=True, forceinline=True)
    def keep_weight(column: Any, tile: Any) -> None:
        """Puts the class weight of a tile's column into shared memory: 1 if there are no weights, 0 past the vocabulary."""
        if column < n:
            v, weight = tile.v_tile * n + column, np.float32(0)
            if v < tile.V:
                weight = np.float32(1)
                if tile.class_weights != 0:
                    weight = memory.load_global_f32(tile.class_weights + np.uint64(4 * v))
            memory.store_shared_f32(np.uint32(tile.columns_smem + np.uint32(4 * column)), weight)

    @cuda.jit(device=True, forceinline=True)
    def begin(rows: Any, found: Any, at: Any) -> Any:
        """The pair's totals: 0, or what earlier parts of the vocabulary have left (in one of the four lanes of a row)."""
        total_0 = total_1 = np.float32(0)
        if rows.resumes and cuda.threadIdx.x & 3 == 0:  # one of the four lanes that share a row
            last = rows.n_listed - 1
            total_0 = found.results[at * found.pitch + token_at(rows.tokens, min(rows.position_0, last))]
            total_1 = found.results[at * found.pitch + token_at(rows.tokens, min(rows.position_1, last))]
        return Totals(total_0, total_1)

    @cuda.jit(device=True, forceinline=True)
    def step(state: Any, z: Any, tile: Any, lse: Any, found: Any, at: Any) -> Any:
        """Adds class weight times logit of half a tile, over this lane's columns, to the two rows' totals."""
        if tile.half == 0:  # both halves have the same columns
            barrier = np.uint32(_FIRST_BARRIER + tile.consumer)
            control.barrier_sync(barrier, np.uint32(_WARPGROUP))  # all have read the weights of the tile before
            keep_weight(tile.thread, tile)
            keep_weight(np.int32(tile.thread + _WARPGROUP), tile)
            control.barrier_sync(barrier, np.uint32(_WARPGROUP))
        own_column = np.int32(2 * (tile.thread & 3))
        total_0, total_1 = add_row_totals(z, own_column, state.total_0, state.total_1, opaque(tile.columns_smem))
        return Totals(total_0, total_1)

    @cuda.jit(device=True, forceinline=True)
    def numbers(state: Any) -> Any:
        """The two rows' totals, over all columns that this worker has seen."""
        return (quad_sum(state.total_0),), (quad_sum(state.total_1),)

    @cuda.jit(device=True, forceinline=True)
    def nothing() -> Any:
        """A total of 0."""
        return (np.float32(0),)

    @cuda.jit(device=True, forceinline=True)
    def merge(left: Any, right: Any) -> Any:
        """The sum of the totals."""
        return (left[0] + right[0],)

    @cuda.jit(device=True, forceinline=True)
    def store(numbers: Any, lse: Any, row: Any, found: Any, survivors: Any, at: Any) -> None:
        """The sum; the host makes a mean of it once all of the vocabulary is in."""
        if row.lane == 0:
            found.results[at * found.pitch + row.token] = numbers[0]

    return SimpleNamespace(begin=begin, step=step, numbers=numbers, nothing=nothing, merge=merge, store=store)


MEAN_LOGIT = Fold(folds.MEAN_LOGIT, make, numbers=1, results=("total_logit",))
