"""The logits of each token's targets, where tokens have several, as they stand in the tile (see `target_logit`)."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import numpy as np
from numba import cuda

from cce_numba import folds
from cce_numba.ptx import arithmetic, control, memory
from cce_numba.tensor_core.folds.chain import NOTHING_TO_TELL, Fold
from cce_numba.tensor_core.fragment import pick_columns
from cce_numba.tensor_core.sums import FULL
from cce_numba.tensor_core.tokens import token_at

load_shared, store_shared, opaque = memory.load_shared_i32, memory.store_shared_i32, arithmetic.opaque_i32
shuffle = control.shuffle_i32


@functools.cache
def make(n: int) -> SimpleNamespace:
    """See `tensor_core.folds`. There is no state: logits go to `SeveralTargets.logits` at once.

    What is no logit, of padding and of targets out of range, `tokens.list_tokens` writes there.
    """
    pick = pick_columns(n)

    @cuda.jit(device=True, forceinline=True)
    def keep_token(position: Any, row: Any, rows: Any) -> None:
        """Puts a row's token into shared memory, -1 if the row is nobody's."""
        token = np.int32(-1)
        if position < rows.n_listed:
            token = token_at(rows.tokens, position)
        store_shared(np.uint32(rows.rows_smem + np.uint32(4 * row)), token)

    @cuda.jit(device=True, forceinline=True)
    def begin(rows: Any, found: Any, at: Any) -> Any:
        """One of the four lanes that share a row keeps its token for all four."""
        cuda.syncwarp()  # all lanes have read the tokens of the block before
        if cuda.threadIdx.x & 3 == 0:
            keep_token(rows.position_0, rows.row, rows)
            keep_token(rows.position_1, rows.row + 8, rows)
        cuda.syncwarp()
        return ()

    @cuda.jit(device=True, forceinline=True)
    def column_of(token: Any, k: Any, v0: Any, V: Any, several: Any) -> Any:
        """Where a token's k-th target stands in the tile that begins with entry v0, -1 if it does not."""
        column = np.int32(-1)
        if token >= 0 and k < several.K:
            target = several.ids[np.int64(token) * several.K + k]
            if target != several.padding and target >= v0 and target < min(v0 + n, V):
                column = np.int32(target - v0)
        return column

    @cuda.jit(device=True, forceinline=True)
    def store_logit(z: Any, column: Any, token: Any, k: Any, several: Any) -> None:
        """By the lane that has the column, if it is one of this tile's."""
        if column >= 0 and (column >> 1) & 3 == cuda.threadIdx.x & 3:
            several.logits[np.int64(token) * several.K + k] = z

    @cuda.jit(device=True, forceinline=True)
    def step(state: Any, z: Any, tile: Any, lse: Any, found: Any, at: Any) -> Any:
        """Stores the logits of the two rows' targets in this half tile. Each of four lanes looks at a fourth of them."""
        # `opaque` hides numbers from LLVM, which would otherwise hoist addresses that are hardly ever used, and spill them.
        thread, several = opaque(np.int32(tile.thread)), found.several
        lane = np.int32(thread & 31)
        row = np.int32((thread >> 5) * 16 + (lane >> 2) + 64 * tile.half)
        smem, v0 = np.uint32(tile.rows_smem + np.uint32(4 * row)), np.int32(tile.v_tile * n)
        first, K = np.int32(0), opaque(np.int32(several.K))
        while first < K:
            # Tokens are loaded again where they are needed: they would take registers.
            own = np.int32(first + (lane & 3))
            of_0 = column_of(load_shared(smem), own, v0, tile.V, several)
            of_1 = column_of(load_shared(smem + np.uint32(32)), own, v0, tile.V, several)
            if cuda.any_sync(FULL, of_0 >= 0 or of_1 >= 0):
                i = np.int32(0)
                while i < 4:  # the targets of each of the four lanes
                    looker = np.uint32((lane & -4) + i)
                    column_0, column_1 = shuffle(of_0, looker), shuffle(of_1, looker)
                    if column_0 >= 0 or column_1 >= 0:
                        z_0, z_1 = pick(z, np.int32(2 * (lane & 3)), column_0, column_1)
                        store_logit(z_0, column_0, load_shared(smem), first + i, several)
                        store_logit(z_1, column_1, load_shared(smem + np.uint32(32)), first + i, several)
                    i = opaque(np.int32(i + 1))  # written out, this loop would be four times as long
            first = np.int32(first + 4)
        return state

    @cuda.jit(device=True, forceinline=True)
    def store(numbers: Any, lse: Any, row: Any, found: Any, survivors: Any, at: Any) -> None:
        """Nothing: `step` has stored the logits."""
        return

    return SimpleNamespace(begin=begin, step=step, store=store, **NOTHING_TO_TELL)


SEVERAL_TARGET_LOGITS = Fold(folds.TARGET_LOGIT, make, numbers=0)
