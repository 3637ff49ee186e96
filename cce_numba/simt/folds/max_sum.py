"""The online log-sum-exp: each row's largest logit so far, and the sum of exp(logit - largest) (paper section 4.2)."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numba import cuda

from cce_numba import folds
from cce_numba.simt.folds.fold import Functions, Given
from cce_numba.simt.tiles import SimtTiles


class State(NamedTuple):
    """Of the rows of a block, in shared memory, (block_n,) real each."""

    largest: Any  # -inf as long as there is no larger logit; NaN is in no maximum
    sum: Any  # of exp(logit - largest); NaN if a logit is
    lost: Any  # what rounding has added to the sum (Kahan's summation)


class Row(NamedTuple):
    """Of one row, real each."""

    largest: Any
    sum: Any


class Arrays(NamedTuple):
    """In global memory, (N,) real each: the results."""

    lse: Any
    max_logit: Any
    log_sum: Any  # of exp(logit - max_logit); kept apart, since a sum of large numbers loses the digits of a small loss


@functools.cache
def make_log_sum_exp(real: Any) -> Any:
    """The device function that takes a row's largest logit and sum, as numbers of `real`, to its log-sum-exp."""
    zero, minus_infinity = real(0), real(-math.inf)

    @cuda.jit(device=True)
    def log_sum_exp(largest: Any, total: Any) -> Any:
        """Natural log: -inf where all logits are -inf, NaN where one is NaN."""
        result = total  # NaN
        if total > zero:
            result = largest + real(math.log(total))
        elif total == zero:
            result = minus_infinity
        return result

    return log_sum_exp


@dataclass(frozen=True)
class MaxSum:
    """The fold."""

    name: ClassVar[str] = folds.MAX_SUM
    Row: ClassVar[Any] = Row

    def row_dtypes(self, real: np.dtype) -> tuple[np.dtype, ...]:
        """See `fold.Fold`."""
        return real, real

    def arrays(self, given: Given) -> Arrays:
        """See `fold.Fold`."""
        p = given.problem
        return Arrays(*p.xp.zeros((3, p.N), p.compute_dtype))

    def results(self, arrays: Arrays) -> dict[str, Any]:
        """See `fold.Fold`."""
        return arrays._asdict()

    def functions(self, tiles: SimtTiles, real: np.dtype) -> Functions:
        """See `fold.Fold`."""
        return _functions(tiles, real.type)


def _functions(tiles: SimtTiles, real: Any) -> Functions:
    block_n, threads, threads_v = tiles.block_n, tiles.threads, tiles.threads_v
    thread_n, thread_v = tiles.thread_n, tiles.thread_v
    zero, minus_infinity = real(0), real(-math.inf)
    log_sum_exp = make_log_sum_exp(real)

    @cuda.jit(device=True)
    def begin(arrays: Any, first_arrays: Any, block: Any) -> Any:
        """The state before the first tile: -inf, 0 and 0 for each row of the block."""
        largest = cuda.shared.array(block_n, real)
        total = cuda.shared.array(block_n, real)
        lost = cuda.shared.array(block_n, real)
        for r in range(cuda.threadIdx.y * threads_v + cuda.threadIdx.x, block_n, threads):
            largest[r], total[r], lost[r] = minus_infinity, zero, zero
        return State(largest, total, lost)

    @cuda.jit(device=True)
    def step(state: Any, first_state: Any, arrays: Any, tile: Any) -> None:
        """Folds a tile of (block_n, block_v) logits: first the rows' largest logits, then their sums of exponentials."""
        x, y = cuda.threadIdx.x, cuda.threadIdx.y
        t = y * threads_v + x

        # The row maxima: each thread those of its own columns, then across the threads of a row.
        for i in range(thread_n):
            largest = minus_infinity
            for j in range(thread_v):
                if tile.logits[i, j] > largest:
                    largest = tile.logits[i, j]
            tile.partial[x, y * thread_n + i] = largest
        cuda.syncthreads()
        for r in range(t, block_n, threads):
            largest = state.largest[r]
            for other in range(threads_v):
                if tile.partial[other, r] > largest:
                    largest = tile.partial[other, r]
            rescale = zero
            if state.largest[r] > minus_infinity:  # else there is nothing to rescale, and -inf - -inf is NaN
                rescale = real(math.exp(state.largest[r] - largest))
            state.largest[r] = largest
            state.sum[r] *= rescale
            state.lost[r] *= rescale
        cuda.syncthreads()

        # The sums of exponentials, likewise. A NaN gets in here: it is in no maximum, but in every sum.
        for i in range(thread_n):
            shift = state.largest[y * thread_n + i]
            if shift == minus_infinity:
                shift = zero
            total = zero
            for j in range(thread_v):
                total += real(math.exp(tile.logits[i, j] - shift))
            tile.partial[x, y * thread_n + i] = total
        cuda.syncthreads()
        for r in range(t, block_n, threads):
            total = -state.lost[r]
            for other in range(threads_v):
                total += tile.partial[other, r]
            new_sum = state.sum[r] + total
            state.lost[r] = (new_sum - state.sum[r]) - total
            state.sum[r] = new_sum
        cuda.syncthreads()

    @cuda.jit(device=True)
    def row(state: Any, r: Any) -> Any:
        """The largest logit and the sum of the r-th row."""
        return Row(state.largest[r], state.sum[r] - state.lost[r])

    @cuda.jit(device=True)
    def merge(row: Any, later: Any) -> Any:
        """The rows of two parts of the vocabulary, whose sums are rescaled to the larger of the two largest logits."""
        largest, total = row.largest, row.sum
        if later.largest > largest:
            if largest > minus_infinity:
                total *= real(math.exp(largest - later.largest))
            largest = later.largest
        if later.largest > minus_infinity:
            total += later.sum * real(math.exp(later.largest - largest))
        else:
            total += later.sum  # 0, or NaN from logits that are all NaN or -inf there
        return Row(largest, total)

    @cuda.jit(device=True)
    def store(row: Any, first_row: Any, arrays: Any, place: Any) -> None:
        """Writes the log-sum-exp of a token."""
        if place.exists:
            arrays.lse[place.token] = log_sum_exp(row.largest, row.sum)
            arrays.max_logit[place.token] = row.largest
            arrays.log_sum[place.token] = log_sum_exp(zero, row.sum)

    return Functions(begin, step, row, merge, store)
