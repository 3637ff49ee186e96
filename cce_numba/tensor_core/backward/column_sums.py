"""The gradient of the bias: each column of G, summed over all tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda

from cce_numba.ptx import arithmetic, memory
from cce_numba.tensor_core.backward.records import PARTS


@cuda.jit(device=True, forceinline=True)
def sum_of_column(
    column: Any, tile: Any, slot: Any, r: Any, first_tile: Any, sums: Any, tables: Any, dims: Any
) -> Any:  # fmt: skip
    """The sum, a float32, of a column of G over all tokens: the parts of its slots are added, block after block.

    column: of the tile, 0 to 127. tile: of sorted columns. slot: first slot of the round's buffer. r: the round. first_tile: of
    the round. sums: address of `Workspace.sums`. tables: the survey's. dims: a `records.Dimensions`.
    """
    needed, bits, before, first_slot = tables.needed, tables.bits, tables.before, tables.first_slot
    column_tiles, block_words = dims.column_tiles, dims.block_words
    slots = np.int64(r) * (dims.blocks + 1)
    total = np.float32(0)
    for word in range(block_words):
        blocks_left = needed[tile * block_words + word]
        while blocks_left != 0:
            block = np.int64(32 * word + cuda.ffs(np.int32(blocks_left)) - 1)
            blocks_left = np.uint32(blocks_left & (blocks_left - np.uint32(1)))
            words, own = block * (4 * column_tiles) + 4 * tile, np.int32(column >> 5)
            below = np.uint32((np.uint32(1) << np.uint32(column & 31)) - np.uint32(1))
            if bits[words + own] & np.uint32(below + np.uint32(1)) != 0:
                counts = block * (column_tiles + 1)
                at = np.int64(slot + first_slot[slots + block] + before[counts + tile] - before[counts + first_tile])
                for other in range(own):
                    at += cuda.popc(bits[words + other])
                at += cuda.popc(np.uint32(bits[words + own] & below))
                of_block = np.float32(0)
                for i in range(PARTS):
                    part = memory.load_if_u32(sums + np.uint64(4 * (at * PARTS + i)), np.uint32(1))
                    of_block += arithmetic.float_of_bits(part)
                total += of_block
    return total
