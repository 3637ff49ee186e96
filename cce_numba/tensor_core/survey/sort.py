"""Survivor bits in the order of the sorted columns."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda

from cce_numba.launch.kernel import Kernel, kernel_factory
from cce_numba.tensor_core.records import SurvivorBits
from cce_numba.tensor_core.sums import FULL, sum_up_to
from cce_numba.tensor_core.survey.tables import COLUMN_TILE, Sizes, Tables


@kernel_factory
def make_sort_kernel() -> Kernel:
    """A CTA for each tile of sorted columns, a thread for each column."""
    tile_columns = COLUMN_TILE

    @cuda.jit(device=True, forceinline=True)
    def bit_at(word: Any, v: Any, i: Any) -> Any:
        """The bit of column v out of its word of survivor bits, moved to bit i of a uint32."""
        return np.uint32((word >> np.uint32(v & 31) & np.uint32(1)) << np.uint32(i))

    @cuda.jit(device=True, forceinline=True)
    def transposed(of_column: Any, lane: Any) -> Any:
        """By a warp, each lane of which has 32 blocks' bits of a column: lane i gets block i's bits of the 32 columns."""
        of_block = np.uint32(0)
        for i in range(32):
            columns = np.uint32(cuda.ballot_sync(FULL, (of_column >> np.uint32(i) & np.uint32(1)) != 0))
            if lane == i:
                of_block = columns
        return of_block

    def sort_kernel(survivors: Any, sizes: Any, tables: Any) -> None:
        """Fills bits, needed and tile_pairs; and `before`, for now with how many columns of each tile survive in each block."""
        words_of, pitch_words, coarse_words = survivors.words, survivors.pitch_words, survivors.coarse_words
        blocks, block_words, column_tiles = sizes.blocks, sizes.block_words, sizes.column_tiles
        words = cuda.shared.array((32, 4), np.uint32)  # bits of 32 blocks
        needed_words = cuda.shared.array((32, 4), np.uint32)  # bits of what dC needs
        t, tile = cuda.threadIdx.x, cuda.blockIdx.x
        lane, warp, v = t & 31, t >> 5, tables.order[tile * tile_columns + t]
        may_survive, all_survive = v >= 0 and tile < tables.n_live_tiles[0], tables.dense[0] != 0
        n_pairs = np.int32(0)
        for word in range(block_words):
            # Bit i of of_column says whether this thread's column survives in block 32 * word + i.
            of_column = np.uint32(tables.active[word]) if may_survive else np.uint32(0)
            needed_of_column = of_column
            if may_survive and not all_survive:
                kept, needed = np.uint32(0), np.uint32(0)
                for i in range(32):
                    at = min(32 * word + i, blocks - 1) * pitch_words + (v >> 5)
                    kept |= bit_at(np.uint32(words_of[at]), v, i)
                    needed |= bit_at(np.uint32(words_of[at + coarse_words]), v, i)
                of_column &= kept
                needed_of_column &= needed
            words[lane, warp], needed_words[lane, warp] = transposed(of_column, lane), transposed(needed_of_column, lane)
            cuda.syncthreads()
            b = 32 * word + (t >> 2)
            if b < blocks:
                tables.bits[(b * column_tiles + tile) * 4 + (t & 3)] = words[t >> 2, t & 3]
            if warp == 0:
                b, count, needed = 32 * word + lane, np.int32(0), np.uint32(0)
                for i in range(4):
                    count += np.int32(cuda.popc(words[lane, i]))
                    needed |= needed_words[lane, i]
                if b < blocks:
                    tables.before[b * (column_tiles + 1) + tile] = count
                n_pairs += count
                needed_of_word = np.uint32(cuda.ballot_sync(FULL, needed != 0))
                if lane == 0:
                    tables.needed[tile * block_words + word] = needed_of_word
            cuda.syncthreads()
        if warp == 0:
            n_pairs = sum_up_to(n_pairs)
            if lane == 31:
                tables.tile_pairs[tile] = n_pairs

    return Kernel(sort_kernel, (SurvivorBits, Sizes, Tables), threads=COLUMN_TILE)
