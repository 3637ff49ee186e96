"""The divergence of a student's head from a teacher's, whose logarithms of probabilities are parked (`tensor_core.parked`).

The log-sum-exps of both heads are known, so this fold needs no other one, and sums of parts are just added. It reads no results
of earlier launches: the vocabulary comes in one.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
from numba import cuda

from cce_numba import folds
from cce_numba.launch.divergence import Divergence
from cce_numba.launch.record import kind_of
from cce_numba.ptx import memory
from cce_numba.tensor_core import parked
from cce_numba.tensor_core.divergence import make_functions
from cce_numba.tensor_core.folds.chain import Fold
from cce_numba.tensor_core.fragment import fold_chunks
from cce_numba.tensor_core.quads import quad_sum
from cce_numba.tensor_core.records import U64, LogSum
from cce_numba.tensor_core.tokens import token_at

load_shared, store_shared = memory.load_shared_i32, memory.store_shared_i32
_CONSUMERS = 2  # of a CTA, each with a slot


@cuda.jit(device=True, forceinline=True)
def place_of(tile: Any, heads: Any) -> Any:
    """Address of what this thread parks of half a tile; tile: `Tile`, heads: `Heads`."""
    slot = np.int32(cuda.blockIdx.x * _CONSUMERS + tile.consumer)
    return parked.place_of(heads.parked, slot, tile.half, tile.thread)


@cuda.jit(device=True, forceinline=True)
def sums_of_rows(tile: Any, sums: Any) -> Any:
    """The `LogSum` of each of the thread's two rows, whose tokens `begin` has kept; sums: `LogSums`."""
    row = np.int32((tile.thread >> 5) * 16 + ((tile.thread & 31) >> 2) + 64 * tile.half)
    smem = np.uint32(tile.rows_smem + np.uint32(4 * row))
    return parked.log_sum_of(load_shared(smem), sums), parked.log_sum_of(load_shared(smem + np.uint32(32)), sums)


@functools.cache
def make_park(n: int) -> Any:
    """The device function `park(z, tile, found)`: parks half a tile of the teacher's logits, for `step` to read."""
    park_all = parked.make_park(n)

    @cuda.jit(device=True, forceinline=True)
    def park(z: Any, tile: Any, found: Any) -> None:
        sums_0, sums_1 = sums_of_rows(tile, found.heads.teacher)
        park_all(z, place_of(tile, found.heads), sums_0, sums_1)

    return park


@functools.cache
def make(which: Divergence, n: int) -> SimpleNamespace:
    """See `tensor_core.folds`. A state is, of each row, the sum of what this lane has seen: of one term, or of both."""
    terms, count, zero = make_functions(which).terms, 1 + which.has_own, np.float32(0)
    two_terms = which.has_own

    def add(state: Any, z: Any, first: Any, place: Any, sums_0: Any, sums_1: Any) -> Any:
        """The state with the thread's four entries of 8 columns."""
        log_p = parked.parked_at(place, first)
        x_00, y_00 = terms(log_p[0], parked.log_probability(z[0], sums_0))
        x_01, y_01 = terms(log_p[1], parked.log_probability(z[1], sums_0))
        x_10, y_10 = terms(log_p[2], parked.log_probability(z[2], sums_1))
        x_11, y_11 = terms(log_p[3], parked.log_probability(z[3], sums_1))
        first_0, first_1 = state[0] + (x_00 + x_01), state[1] + (x_10 + x_11)
        if two_terms:
            return first_0, first_1, state[2] + (y_00 + y_01), state[3] + (y_10 + y_11)
        return first_0, first_1

    row = kind_of(LogSum)
    add_all = fold_chunks(n, parked.CHUNK, 2 * count, add, U64, row, row)

    @cuda.jit(device=True, forceinline=True)
    def begin(rows: Any, found: Any, at: Any) -> Any:
        """Nothing so far. One of the four lanes that share a row keeps its token in shared memory; some if it has none."""
        cuda.syncwarp()  # all lanes have read the tokens of the block before
        if cuda.threadIdx.x & 3 == 0:
            smem, last = np.uint32(rows.rows_smem + np.uint32(4 * rows.row)), np.int32(rows.n_listed - 1)
            store_shared(smem, token_at(rows.tokens, min(rows.position_0, last)))
            store_shared(smem + np.uint32(32), token_at(rows.tokens, min(rows.position_1, last)))
        cuda.syncwarp()
        if two_terms:
            return zero, zero, zero, zero
        return zero, zero

    @cuda.jit(device=True, forceinline=True)
    def step(state: Any, z: Any, tile: Any, lse: Any, found: Any, at: Any) -> Any:
        """Adds half a tile. What is past the vocabulary has a probability of 0 in both heads, and adds nothing."""
        sums_0, sums_1 = sums_of_rows(tile, found.heads.student)
        return add_all(z, state, place_of(tile, found.heads), sums_0, sums_1)

    @cuda.jit(device=True, forceinline=True)
    def numbers(state: Any) -> Any:
        """The sums over the four lanes that share a row."""
        if two_terms:
            return (quad_sum(state[0]), quad_sum(state[2])), (quad_sum(state[1]), quad_sum(state[3]))
        return (quad_sum(state[0]),), (quad_sum(state[1]),)

    @cuda.jit(device=True, forceinline=True)
    def nothing() -> Any:
        """Sums of 0."""
        if two_terms:
            return zero, zero
        return (zero,)

    @cuda.jit(device=True, forceinline=True)
    def merge(left: Any, right: Any) -> Any:
        """Their sums."""
        if two_terms:
            return left[0] + right[0], left[1] + right[1]
        return (left[0] + right[0],)

    @cuda.jit(device=True, forceinline=True)
    def store(numbers: Any, lse: Any, row: Any, found: Any, survivors: Any, at: Any) -> None:
        """Lane 0 writes the sums of a token."""
        if row.lane == 0:
            found.results[at * found.pitch + row.token] = numbers[0]
            if two_terms:
                found.results[(at + 1) * found.pitch + row.token] = numbers[1]

    return SimpleNamespace(
        begin=begin, step=step, numbers=numbers, nothing=nothing, merge=merge, store=store,
    )  # fmt: skip


@dataclass(frozen=True)
class _Make:
    """`make` of a divergence; a dataclass, so that kernels with this fold can be told from others (`launch.identity`)."""

    which: Divergence

    def __call__(self, n: int) -> SimpleNamespace:
        return make(self.which, n)


@functools.cache
def divergence_of(which: Divergence) -> Fold:
    """The fold of a divergence."""
    results = ("divergence", "of_student")[: 1 + which.has_own]
    return Fold(folds.DIVERGENCE, _Make(which), numbers=len(results), results=results, alone=True)
