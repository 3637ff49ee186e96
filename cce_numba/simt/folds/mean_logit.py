"""The mean over the vocabulary of class weight times logit, which label smoothing under a softcap needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numba import cuda

from cce_numba import folds
from cce_numba.simt.folds.fold import Functions, Given
from cce_numba.simt.product import make_product
from cce_numba.simt.tiles import SimtTiles


class State(NamedTuple):
    """Of the rows of a block, in shared memory."""

    total: Any  # (block_n,) float64: of class weight times logit


class Row(NamedTuple):
    """Of one row."""

    total: Any  # float64


class Arrays(NamedTuple):
    """In global memory."""

    class_weights: Any  # (V,) real
    has_class_weights: Any  # bool: without, all are 1
    mean_logit: Any  # (N,) real: the result


@dataclass(frozen=True)
class MeanLogit:
    """The fold."""

    name: ClassVar[str] = folds.MEAN_LOGIT
    Row: ClassVar[Any] = Row

    def row_dtypes(self, real: np.dtype) -> tuple[np.dtype, ...]:
        """See `fold.Fold`."""
        return (np.dtype(np.float64),)

    def arrays(self, given: Given) -> Arrays:
        """See `fold.Fold`."""
        p = given.problem
        absent = p.class_weights is None
        return Arrays(
            class_weights=p.xp.empty(1, p.compute_dtype) if absent else p.class_weights,
            has_class_weights=not absent,
            mean_logit=p.xp.zeros(p.N, p.compute_dtype),
        )

    def results(self, arrays: Arrays) -> dict[str, Any]:
        """See `fold.Fold`."""
        return {"mean_logit": arrays.mean_logit}

    def functions(self, tiles: SimtTiles, real: np.dtype) -> Functions:
        """See `fold.Fold`."""
        return _functions(tiles, real.type)


def _functions(tiles: SimtTiles, real: Any) -> Functions:
    block_n, threads, threads_v = tiles.block_n, tiles.threads, tiles.threads_v
    thread_n, thread_v = tiles.thread_n, tiles.thread_v
    column_of = make_product(tiles, real).column_of
    one = real(1)

    @cuda.jit(device=True)
    def begin(arrays: Any, first_arrays: Any, block: Any) -> Any:
        """The state before the first tile: a total of 0 for each row of the block."""
        total = cuda.shared.array(block_n, np.float64)
        for r in range(cuda.threadIdx.y * threads_v + cuda.threadIdx.x, block_n, threads):
            total[r] = 0
        return State(total)

    @cuda.jit(device=True)
    def weight_of(arrays: Any, v: Any) -> Any:
        """The class weight of a vocabulary entry; 1 without class weights."""
        return arrays.class_weights[v] if arrays.has_class_weights else one

    @cuda.jit(device=True)
    def step(state: Any, first_state: Any, arrays: Any, tile: Any) -> None:
        """Adds class weight times logit of a tile of (block_n, block_v) logits, to each row's total."""
        x, y = cuda.threadIdx.x, cuda.threadIdx.y
        for i in range(thread_n):
            total = real(0)
            for j in range(thread_v):
                v = tile.v0 + column_of(j)
                if v < tile.V:
                    weight = weight_of(arrays, v)
                    if weight != 0:  # 0 takes a logit out, even one that is not finite
                        total += tile.logits[i, j] * weight
            tile.partial[x, y * thread_n + i] = total
        cuda.syncthreads()
        for r in range(y * threads_v + x, block_n, threads):
            for other in range(threads_v):
                state.total[r] += tile.partial[other, r]
        cuda.syncthreads()

    @cuda.jit(device=True)
    def row(state: Any, r: Any) -> Any:
        """The total of the r-th row."""
        return Row(state.total[r])

    @cuda.jit(device=True)
    def merge(row: Any, later: Any) -> Any:
        """The sum of the totals."""
        return Row(row.total + later.total)

    @cuda.jit(device=True)
    def store(row: Any, first_row: Any, arrays: Any, place: Any) -> None:
        """Writes the mean logit of a token: its total over all V entries, divided by V."""
        if place.exists:
            arrays.mean_logit[place.token] = real(row.total / place.V)

    return Functions(begin, step, row, merge, store)
