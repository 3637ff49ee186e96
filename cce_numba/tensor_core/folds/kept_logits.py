"""Logits that are kept for the backward (`tensor_core.kept`), relative to the log-sum-exp so far."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import numpy as np
from numba import cuda

from cce_numba import folds
from cce_numba.ptx import arithmetic, memory
from cce_numba.survivors import SURVIVOR_BLOCK
from cce_numba.tensor_core import kept
from cce_numba.tensor_core.folds.chain import NOTHING_TO_TELL, Fold

opaque = arithmetic.opaque_i32


@functools.cache
def make(n: int) -> SimpleNamespace:
    """See `tensor_core.folds`. There is no state: each tile is met by one worker, which stores it at once."""
    if n != kept.TILE_V:
        raise ValueError(f"n: tiles that are kept have {kept.TILE_V} columns, got {n}")
    store_codes = kept.make_store()

    @cuda.jit(device=True, forceinline=True)
    def begin(rows: Any, found: Any, at: Any) -> Any:
        return ()

    @cuda.jit(device=True, forceinline=True)
    def step(state: Any, z: Any, tile: Any, lse: Any, found: Any, at: Any) -> Any:
        """Keeps half a tile, if it is one of those that are kept."""
        # `opaque` hides numbers from LLVM, which would otherwise hoist addresses out of the loop, and spill them.
        block = np.int64(tile.survivors.first_block + opaque(np.int32(tile.block)))
        if tile.v_tile < found.kept_tiles and block < found.kept_blocks:
            thread = opaque(np.int32(tile.thread))
            address = np.uint64(found.kept + np.uint64(kept.TILE_BYTES) * np.uint64(block * found.kept_tiles + tile.v_tile))
            row = np.int32((thread >> 5) * 16 + ((thread & 31) >> 2) + SURVIVOR_BLOCK // 2 * tile.half)
            bases = np.uint64(address + np.uint64(kept.BASES_BYTES + 4 * row))
            if thread & 3 == 0:
                memory.store_global_f32(bases, lse[0])
                memory.store_global_f32(bases + np.uint64(32), lse[1])
            store_codes(z, np.uint64(address + np.uint64(kept.HALF_BYTES * tile.half + 16 * thread)), lse[0], lse[1])
        return state

    @cuda.jit(device=True, forceinline=True)
    def store(numbers: Any, lse: Any, row: Any, found: Any, survivors: Any, at: Any) -> None:
        """Nothing: `step` has stored all."""
        return

    return SimpleNamespace(begin=begin, step=step, store=store, **NOTHING_TO_TELL)


KEPT_LOGITS = Fold(folds.KEPT_LOGITS, make, numbers=0)
