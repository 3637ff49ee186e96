"""The sum of squared probabilities: the sum of exp(y)**2, with y = logit - largest. See `cce_numba/folds.py`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numba import cuda

from cce_numba import folds
from cce_numba.simt.folds.fold import Functions, Given
from cce_numba.simt.tiles import SimtTiles


class State(NamedTuple):
    """Of the rows of a block, in shared memory, (block_n,) each."""

    largest: Any  # real: what `MaxSum` had after the last tile
    total: Any  # float64: of exp(y)**2


class Row(NamedTuple):
    """Of one row."""

    largest: Any  # real
    total: Any  # float64


class Arrays(NamedTuple):
    """In global memory."""

    sum_squares: Any  # (N,) real: the result


@dataclass(frozen=True)
class SumSquares:
    """The fold."""

    name: ClassVar[str] = folds.SUM_SQUARES
    Row: ClassVar[Any] = Row

    def row_dtypes(self, real: np.dtype) -> tuple[np.dtype, ...]:
        """See `fold.Fold`."""
        return real, np.dtype(np.float64)

    def arrays(self, given: Given) -> Arrays:
        """See `fold.Fold`."""
        p = given.problem
        return Arrays(p.xp.zeros(p.N, p.compute_dtype))

    def results(self, arrays: Arrays) -> dict[str, Any]:
        """See `fold.Fold`."""
        return {"sum_squares": arrays.sum_squares}

    def functions(self, tiles: SimtTiles, real: np.dtype) -> Functions:
        """See `fold.Fold`."""
        return _functions(tiles, real.type)


def _functions(tiles: SimtTiles, real: Any) -> Functions:
    block_n, threads, threads_v = tiles.block_n, tiles.threads, tiles.threads_v
    thread_n, thread_v = tiles.thread_n, tiles.thread_v
    zero, minus_infinity, nan = real(0), real(-math.inf), real(math.nan)

    @cuda.jit(device=True)
    def rescaled(total: Any, old: Any, new: Any) -> Any:
        """The sum of exp(y)**2 for a new largest logit, from one for the old one."""
        result = np.float64(0)
        if old > minus_infinity:  # else there is nothing to rescale, and -inf - -inf is NaN
            result = total * math.exp(2 * (np.float64(old) - np.float64(new)))
        return result

    @cuda.jit(device=True)
    def begin(arrays: Any, first_arrays: Any, block: Any) -> Any:
        """The state before the first tile: nothing is seen."""
        largest = cuda.shared.array(block_n, real)
        total = cuda.shared.array(block_n, np.float64)
        for r in range(cuda.threadIdx.y * threads_v + cuda.threadIdx.x, block_n, threads):
            largest[r], total[r] = minus_infinity, 0
        return State(largest, total)

    @cuda.jit(device=True)
    def step(state: Any, first_state: Any, arrays: Any, tile: Any) -> None:
        """Adds a tile of (block_n, block_v) logits, which the first fold has taken already."""
        x, y = cuda.threadIdx.x, cuda.threadIdx.y
        for i in range(thread_n):
            shift = first_state.largest[y * thread_n + i]
            if shift == minus_infinity:
                shift = zero
            total = zero
            for j in range(thread_v):
                p = real(math.exp(tile.logits[i, j] - shift))
                total += p * p
            tile.partial[x, y * thread_n + i] = total
        cuda.syncthreads()
        for r in range(y * threads_v + x, block_n, threads):
            total = rescaled(state.total[r], state.largest[r], first_state.largest[r])
            for other in range(threads_v):
                total += tile.partial[other, r]
            state.largest[r], state.total[r] = first_state.largest[r], total
        cuda.syncthreads()

    @cuda.jit(device=True)
    def row(state: Any, r: Any) -> Any:
        """What the r-th row has."""
        return Row(state.largest[r], state.total[r])

    @cuda.jit(device=True)
    def merge(row: Any, later: Any) -> Any:
        """The rows of two parts of the vocabulary, for the larger of the two largest logits."""
        largest = max(row.largest, later.largest)
        return Row(largest, rescaled(row.total, row.largest, largest) + rescaled(later.total, later.largest, largest))

    @cuda.jit(device=True)
    def store(row: Any, first_row: Any, arrays: Any, place: Any) -> None:
        """Writes the sum of a token's squared probabilities: NaN where the log-sum-exp is NaN, or all logits are -inf."""
        if place.exists:
            result = nan
            if first_row.sum > zero:
                total = np.float64(first_row.sum)
                result = real(row.total / (total * total))
            arrays.sum_squares[place.token] = result

    return Functions(begin, step, row, merge, store)
