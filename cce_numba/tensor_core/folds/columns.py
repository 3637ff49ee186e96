"""A number of each of a tile's columns, in a consumer's own shared memory: threads have rows, and no registers for columns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import cuda

from cce_numba.ptx import control, memory

_WARPGROUP = 128  # threads
_WARP = 32
_FIRST_BARRIER = 2  # of consumer 0; its own barriers follow each other


def kept_number(column: Any, columns_smem: Any) -> Any:
    """The number of a tile's column. columns_smem: `Tile.columns_smem`, out of an ordered instruction after `keep_columns`."""
    return memory.load_shared_f32_freely(np.uint32(columns_smem + np.uint32(4 * column)))


def make_keep_columns(n: int, number_of: Callable[..., Any]) -> Any:
    """The device function `keep_columns(tile)`: keeps the float32 `number_of(v, tile)` of each of n columns.

    By a consumer, whose warps have the same columns, or by a warp that has columns of its own, as `tile.keepers` says.
    number_of: a device function of a vocabulary entry, which may lie past the last one, and of a `Tile`. All rows of a tile
    have the same columns, so only the first that come do something. At most one fold of a chain may keep columns.
    """

    @cuda.jit(device=True, forceinline=True)
    def keep_one(column: Any, tile: Any) -> None:
        if column < n:
            number = number_of(np.int32(tile.v_tile * n + column), tile)
            memory.store_shared_f32(np.uint32(tile.columns_smem + np.uint32(4 * column)), number)

    @cuda.jit(device=True, forceinline=True)
    def keep_columns(tile: Any) -> None:
        if tile.keepers == _WARP:
            if tile.thread < _WARP:  # the warp's first 16 rows
                cuda.syncwarp()  # all have read the numbers of the tile before
                for column in range(tile.thread, n, _WARP):
                    keep_one(np.int32(column), tile)
                cuda.syncwarp()
        elif tile.half == 0:
            barrier = np.uint32(_FIRST_BARRIER + tile.consumer)
            control.barrier_sync(barrier, np.uint32(_WARPGROUP))  # all have read the numbers of the tile before
            keep_one(tile.thread, tile)
            keep_one(np.int32(tile.thread + _WARPGROUP), tile)
            control.barrier_sync(barrier, np.uint32(_WARPGROUP))

    return keep_columns
