"""The two largest logits of each group of a row's columns, by which the best entries are found later (`tensor_core.top_k`).

A group is what a lane has of a row of a tile: n / 4 columns.
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
from cce_numba.tensor_core.folds.chain import NOTHING_TO_TELL, Fold
from cce_numba.tensor_core.fragment import best_two_of_rows

GROUPS = 4  # of a row of a tile
GROUP_BYTES = 12  # of a group: the largest logit; elsewhere the second largest, and the place of the largest as an int32
opaque, float_of_bits = arithmetic.opaque_i32, arithmetic.float_of_bits


@register_jitable
def entry_of(group: Any, i: Any, n: Any) -> Any:
    """The i-th entry, of n / 4, of a group of a row; tiles have n columns.

    >>> [[entry_of(g, i, 192) for i in range(3)] for g in (0, 1, 4)]
    [[0, 1, 8], [2, 3, 10], [192, 193, 200]]
    """
    return group // GROUPS * n + i // 2 * 8 + group % GROUPS * 2 + i % 2


@functools.cache
def make(n: int) -> SimpleNamespace:
    """See `tensor_core.folds`. There is no state: what is found goes to `GroupMaxima` at once."""
    best_two = best_two_of_rows(n)

    @cuda.jit(device=True, forceinline=True)
    def begin(rows: Any, found: Any, at: Any) -> Any:
        """Nothing."""
        return ()

    @cuda.jit(device=True, forceinline=True)
    def store_group(maxima: Any, at: Any, best: Any, second: Any, place: Any) -> None:
        """Stores what is known of the group whose number in the batch is `at`."""
        memory.store_global_f32(np.uint64(maxima.best + np.uint64(4 * at)), best)
        others = np.uint64(maxima.others + np.uint64(8 * at))
        memory.store_if_2_f32(others, second, float_of_bits(np.uint32(place)), np.uint32(1))

    @cuda.jit(device=True, forceinline=True)
    def step(state: Any, z: Any, tile: Any, lse: Any, found: Any, at: Any) -> Any:
        """Stores the lane's groups of its two rows."""
        # `opaque` hides numbers from LLVM, which would otherwise keep addresses in registers across the products.
        thread, maxima = opaque(np.int32(tile.thread)), found.maxima
        lane = np.int32(thread & 31)
        row = np.int32((thread >> 5) * 16 + (lane >> 2) + 64 * tile.half)
        position = np.int64(opaque(np.int32(tile.block)) * SURVIVOR_BLOCK + row)
        group = np.int64(position * maxima.pitch + GROUPS * tile.v_tile + (lane & 3))
        (best_0, second_0, best_1, second_1), (place_0, place_1) = best_two(z)
        store_group(maxima, group, best_0, second_0, place_0)
        store_group(maxima, np.int64(group + 8 * maxima.pitch), best_1, second_1, place_1)
        return state

    @cuda.jit(device=True, forceinline=True)
    def store(numbers: Any, lse: Any, row: Any, found: Any, survivors: Any, at: Any) -> None:
        """Nothing: `step` has stored all there is."""
        return

    return SimpleNamespace(begin=begin, step=step, store=store, **NOTHING_TO_TELL)


GROUP_MAXIMA = Fold(folds.TOP_K, make, numbers=0)
