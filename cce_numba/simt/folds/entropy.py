"""The entropy: the sum of exp(y) * y, with y = logit - largest. See `cce_numba/folds.py`."""

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
    sum: Any  # real: likewise
    total: Any  # float64: of exp(y) * y


class Row(NamedTuple):
    """Of one row."""

    largest: Any  # real
    sum: Any  # real
    total: Any  # float64


class Arrays(NamedTuple):
    """In global memory."""

    entropy: Any  # (N,) real: the result


@dataclass(frozen=True)
class Entropy:
    """The fold."""

    name: ClassVar[str] = folds.ENTROPY
    Row: ClassVar[Any] = Row

    def row_dtypes(self, real: np.dtype) -> tuple[np.dtype, ...]:
        """See `fold.Fold`."""
        return real, real, np.dtype(np.float64)

    def arrays(self, given: Given) -> Arrays:
        """See `fold.Fold`."""
        p = given.problem
        return Arrays(p.xp.zeros(p.N, p.compute_dtype))

    def results(self, arrays: Arrays) -> dict[str, Any]:
        """See `fold.Fold`."""
        return {"entropy": arrays.entropy}

    def functions(self, tiles: SimtTiles, real: np.dtype) -> Functions:
        """See `fold.Fold`."""
        return _functions(tiles, real.type)


def _functions(tiles: SimtTiles, real: Any) -> Functions:
    block_n, threads, threads_v = tiles.block_n, tiles.threads, tiles.threads_v
    thread_n, thread_v = tiles.thread_n, tiles.thread_v
    zero, minus_infinity, nan = real(0), real(-math.inf), real(math.nan)

    @cuda.jit(device=True)
    def rescaled(total: Any, seen: Any, old: Any, new: Any) -> Any:
        """The sum of exp(y) * y for a new largest logit, from one, and the sum of exp(y), for the old one."""
        result = np.float64(0)
        if old > minus_infinity:  # else there is nothing to rescale, and -inf - -inf is NaN
            less = np.float64(old) - np.float64(new)
            result = math.exp(less) * (total + less * np.float64(seen))
        return result

    @cuda.jit(device=True)
    def begin(arrays: Any, first_arrays: Any, block: Any) -> Any:
        """The state before the first tile: nothing is seen."""
        largest = cuda.shared.array(block_n, real)
        seen = cuda.shared.array(block_n, real)
        total = cuda.shared.array(block_n, np.float64)
        for r in range(cuda.threadIdx.y * threads_v + cuda.threadIdx.x, block_n, threads):
            largest[r], seen[r], total[r] = minus_infinity, zero, 0
        return State(largest, seen, total)

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
                less = tile.logits[i, j] - shift
                p = real(math.exp(less))
                if not (p <= zero):  # -inf times 0 would be NaN; a NaN gets in
                    total += p * less
            tile.partial[x, y * thread_n + i] = total
        cuda.syncthreads()
        for r in range(y * threads_v + x, block_n, threads):
            total = rescaled(state.total[r], state.sum[r], state.largest[r], first_state.largest[r])
            for other in range(threads_v):
                total += tile.partial[other, r]
            state.largest[r], state.sum[r], state.total[r] = first_state.largest[r], first_state.sum[r], total
        cuda.syncthreads()

    @cuda.jit(device=True)
    def row(state: Any, r: Any) -> Any:
        """What the r-th row has."""
        return Row(state.largest[r], state.sum[r], state.total[r])

    @cuda.jit(device=True)
    def merge(row: Any, later: Any) -> Any:
        """The rows of two parts of the vocabulary, for the larger of the two largest logits."""
        largest = max(row.largest, later.largest)
        total = rescaled(row.total, row.sum, row.largest, largest)
        total += rescaled(later.total, later.sum, later.largest, largest)
        seen = zero
        if row.largest > minus_infinity:
            seen += row.sum * real(math.exp(row.largest - largest))
        if later.largest > minus_infinity:
            seen += later.sum * real(math.exp(later.largest - largest))
        return Row(largest, seen, total)

    @cuda.jit(device=True)
    def store(row: Any, first_row: Any, arrays: Any, place: Any) -> None:
        """Writes the entropy of a token, in nats: NaN where the log-sum-exp is NaN, or all logits are -inf."""
        if place.exists:
            entropy = nan
            if first_row.sum > zero:
                entropy = real(math.log(first_row.sum) - row.total / first_row.sum)
            arrays.entropy[place.token] = entropy

    return Functions(begin, step, row, merge, store)
