"""The target's logit of each token, as it stands in the tile: rounded as the others are, so that differences keep their digits.

A dot product by itself (`indexed_dot`) sums up in another order. That would leave few digits of a confident token's loss, which
is a small difference of large numbers.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import numpy as np
from numba import cuda

from cce_numba import folds
from cce_numba.ptx import arithmetic, memory
from cce_numba.survivors import SURVIVOR_BLOCK
from cce_numba.tensor_core.folds.chain import NOTHING_TO_TELL, Fold
from cce_numba.tensor_core.fragment import pick_columns
from cce_numba.tensor_core.tokens import token_at

load_shared, store_shared, opaque = memory.load_shared_i32, memory.store_shared_i32, arithmetic.opaque_i32


@functools.cache
def make(n: int) -> SimpleNamespace:
    """See `tensor_core.folds`. There is no state: the one worker that meets a token's target stores its logit at once."""
    pick = pick_columns(n)

    @cuda.jit(device=True, forceinline=True)
    def keep_target(position: Any, row: Any, rows: Any, found: Any) -> None:
        """Puts a row's target into shared memory, -1 if it is out of range or the row is nobody's."""
        target = np.int32(-1)
        if position < rows.n_listed:
            given = found.targets[token_at(rows.tokens, position)]
            if given >= 0 and given < rows.V:
                target = np.int32(given)
        store_shared(np.uint32(rows.rows_smem + np.uint32(4 * row)), target)

    @cuda.jit(device=True, forceinline=True)
    def begin(rows: Any, found: Any, at: Any) -> Any:
        """One of the four lanes that share a row keeps its target for all four."""
        cuda.syncwarp()  # all lanes have read the targets of the block before
        if cuda.threadIdx.x & 3 == 0:
            keep_target(rows.position_0, rows.row, rows, found)
            keep_target(rows.position_1, rows.row + 8, rows, found)
        cuda.syncwarp()
        return ()

    @cuda.jit(device=True, forceinline=True)
    def store_logit(z: Any, column: Any, row: Any, tile: Any, found: Any, at: Any) -> None:
        """By the lane that has the column, if it is one of this tile's."""
        if column >= 0 and column < n and (column >> 1) & 3 == cuda.threadIdx.x & 3:
            token = token_at(tile.tokens, np.int32(opaque(np.int32(tile.block)) * SURVIVOR_BLOCK + row))
            found.results[opaque(np.int32(at)) * found.pitch + token] = z

    @cuda.jit(device=True, forceinline=True)
    def step(state: Any, z: Any, tile: Any, lse: Any, found: Any, at: Any) -> Any:
        """Stores the logit of each of the two rows whose target is in this half tile."""
        # `opaque` hides numbers from LLVM, which would otherwise hoist addresses that are hardly ever used, and spill them.
        thread = opaque(np.int32(tile.thread))
        lane = np.int32(thread & 31)
        row = np.int32((thread >> 5) * 16 + (lane >> 2) + 64 * tile.half)
        smem, v0 = np.uint32(tile.rows_smem + np.uint32(4 * row)), np.int32(tile.v_tile * n)
        column_0, column_1 = np.int32(load_shared(smem) - v0), np.int32(load_shared(smem + np.uint32(32)) - v0)
        if (column_0 >= 0 and column_0 < n) or (column_1 >= 0 and column_1 < n):
            z_0, z_1 = pick(z, np.int32(2 * (lane & 3)), column_0, column_1)
            store_logit(z_0, column_0, row, tile, found, at)
            store_logit(z_1, column_1, row + 8, tile, found, at)
        return state

    @cuda.jit(device=True, forceinline=True)
    def store(numbers: Any, lse: Any, row: Any, found: Any, survivors: Any, at: Any) -> None:
        """Nothing: `step` has stored the logit, and `tokens.list_tokens` NaN for a target out of range."""
        return

    return SimpleNamespace(begin=begin, step=step, store=store, **NOTHING_TO_TELL)


TARGET_LOGIT = Fold(folds.TARGET_LOGIT, make, numbers=0, results=("target_logit",))
