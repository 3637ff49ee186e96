"""The largest logit of each group of a row's columns, by which the best entries are found afterwards (`tensor_core.top_k`).

A lane has n / 4 columns of a row of a tile. They are one group, or some groups of equally many columns where that is cheap.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import numpy as np
from numba import cuda
from numba.extending import register_jitable

from cce_numba import folds
from cce_numba.ptx import arithmetic, memory
from cce_numba.survivors import SURVIVOR_BLOCK
from cce_numba.tensor_core.exponentials import NEGATIVE_INFINITY
from cce_numba.tensor_core.folds.chain import NOTHING_TO_TELL, Fold
from cce_numba.tensor_core.folds.max_sum import larger
from cce_numba.tensor_core.fragment import fold_chunk_rows

_WIDE = 192  # columns of a tile whose lanes have four groups each
opaque = arithmetic.opaque_i32


def chunks_of(n: int) -> int:
    """Into how many parts a tile of n columns is cut, in each of which a lane's columns are a group.

    >>> chunks_of(192), chunks_of(64)
    (4, 1)
    """
    return 4 if n == _WIDE else 1


def groups_of(n: int) -> int:
    """Groups of a row of a tile of n columns: those of four lanes."""
    return 4 * chunks_of(n)


@register_jitable
def entry_of(group: Any, i: Any, n: Any, chunks: Any) -> Any:
    """The i-th entry, of n // chunks // 4, of a group of a row; tiles have n columns.

    >>> [[entry_of(g, i, 192, 4) for i in range(3)] for g in (0, 1, 4, 16)]
    [[0, 1, 8], [48, 49, 56], [2, 3, 10], [192, 193, 200]]
    """
    tile, place = group // (4 * chunks), group % (4 * chunks)
    return tile * n + place % chunks * (n // chunks) + i // 2 * 8 + place // chunks * 2 + i % 2


@functools.cache
def make(n: int) -> SimpleNamespace:
    """See `tensor_core.folds`. There is no state: maxima go to `GroupMaxima` at once."""
    chunks, groups = chunks_of(n), groups_of(n)
    maxima_of = fold_chunk_rows(n, chunks, larger)

    @cuda.jit(device=True, forceinline=True)
    def begin(rows: Any, found: Any, at: Any) -> Any:
        """Nothing."""
        return ()

    @cuda.jit(device=True, forceinline=True)
    def step(state: Any, z: Any, tile: Any, lse: Any, found: Any, at: Any) -> Any:
        """Stores the maxima of the lane's groups of its two rows."""
        # `opaque` hides numbers from LLVM, which would otherwise keep addresses in registers across the products.
        thread, maxima = opaque(np.int32(tile.thread)), found.maxima
        lane = np.int32(thread & 31)
        row = np.int32((thread >> 5) * 16 + (lane >> 2) + 64 * tile.half)
        position = np.int64(opaque(np.int32(tile.block)) * SURVIVOR_BLOCK + row)
        first = np.int64(groups * tile.v_tile + chunks * (lane & 3))
        to = np.uint64(maxima.address + np.uint64(4 * (position * maxima.pitch + first)))
        next_row = np.uint64(to + np.uint64(4 * (8 * maxima.pitch)))
        largest = maxima_of(z, NEGATIVE_INFINITY)
        if chunks == 4:
            memory.store_4_f32(to, largest[0], largest[1], largest[2], largest[3])
            memory.store_4_f32(next_row, largest[4], largest[5], largest[6], largest[7])
        else:
            memory.store_global_f32(to, largest[0])
            memory.store_global_f32(next_row, largest[1])
        return state

    @cuda.jit(device=True, forceinline=True)
    def store(numbers: Any, lse: Any, row: Any, found: Any, survivors: Any, at: Any) -> None:
        """Nothing: `step` has stored all there is."""
        return

    return SimpleNamespace(begin=begin, step=step, store=store, **NOTHING_TO_TELL)


GROUP_MAXIMA = Fold(folds.TOP_K, make, numbers=0)
