"""Products of a job that recomputes logits become logits; or logits that the forward kept take their place."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import cuda

from cce_numba.launch.record import kind_of
from cce_numba.ptx import memory
from cce_numba.tensor_core import kept
from cce_numba.tensor_core.backward.records import ListColumns
from cce_numba.tensor_core.fragment import change_chunks
from cce_numba.tensor_core.logits import make_logit_of
from cce_numba.tensor_core.records import F32, RowWeights


@functools.cache
def make_to_logits(n: int, capped: bool, scaled: bool) -> Any:
    """The function `z = to_logits(x, columns, row_0, row_1, softcap)` for 64 tokens x n columns.

    x: products without biases. columns: a `ListColumns`. row_0, row_1: `RowWeights`. capped, scaled: see
    `gradient.make_gradient`.
    """

    logit_of = make_logit_of(capped, scaled)

    def eight_columns(x: Any, first: Any, columns: Any, row_0: Any, row_1: Any, softcap: Any) -> Any:
        """The thread's four logits in the eight columns from `first` on."""
        place = np.uint32(4 * (first + 2 * (np.int32(cuda.threadIdx.x) & 3)))
        bias = memory.load_shared_2_f32_freely(columns.biases + place)
        z_0, z_1 = logit_of(x[0] + bias[0], row_0, softcap), logit_of(x[1] + bias[1], row_0, softcap)
        return z_0, z_1, logit_of(x[2] + bias[0], row_1, softcap), logit_of(x[3] + bias[1], row_1, softcap)

    row = kind_of(RowWeights)
    return change_chunks(n, 8, eight_columns, kind_of(ListColumns), row, row, F32)


@functools.cache
def make_logits_of(n: int, capped: bool, scaled: bool) -> Any:
    """The device function `z = logits_of(x, half, tile, place, thread, columns, row_0, row_1, softcap)`.

    Args of the function:
        x: a fragment of the products of 64 tokens; nobody's if the tile was kept.
        half: 0 for the upper 64 tokens of the block, 1 for the lower.
        tile: the number of the tile among those of its block that were kept, or -1.
        place: address of the first of the block's tiles.
        thread: 0 to 127.
        columns, row_0, row_1, softcap: see `make_to_logits`.
    """
    to_logits, load_codes = make_to_logits(n, capped, scaled), kept.make_load()

    @cuda.jit(device=True, forceinline=True)
    def logits_of(
        x: Any, half: Any, tile: Any, place: Any, thread: Any, columns: Any, row_0: Any, row_1: Any, softcap: Any
    ) -> Any:  # fmt: skip
        if tile >= 0:
            address = np.uint64(place + np.uint64(kept.TILE_BYTES) * np.uint64(tile))
            row = np.int32((thread >> 5) * 16 + ((thread & 31) >> 2) + 64 * half)
            bases = np.uint64(address + np.uint64(kept.BASES_BYTES + 4 * row))
            base_0, base_1 = memory.load_global_f32(bases), memory.load_global_f32(bases + np.uint64(32))
            x = load_codes(x, np.uint64(address + np.uint64(kept.HALF_BYTES * half + 16 * thread)), base_0, base_1)
        else:
            x = to_logits(x, columns, row_0, row_1, softcap)
        return x

    return logits_of
