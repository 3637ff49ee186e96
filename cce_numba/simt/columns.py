"""The survivor bits of a chunk of the vocabulary, compacted to a list of columns for each block of tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda

from cce_numba.gpu import SIMULATED
from cce_numba.launch.array_kernel import ArrayKernel
from cce_numba.launch.kernel import kernel_factory
from cce_numba.simt.records import survives, takes_part
from cce_numba.simt.tiles import SimtTiles

_THREADS = 4 if SIMULATED else 128


@kernel_factory
def make_list_columns_kernel(tiles: SimtTiles) -> ArrayKernel:
    """Each thread lists a contiguous part of the chunk, so that the whole list is in order."""
    block_n, threads = tiles.block_n, _THREADS

    def list_columns_kernel(
        survivors: Any,  # Survivors
        tokens: Any,  # Tokens
        weights: Any,  # Weights
        columns: Any,  # Columns, whose list and counts are to be written
    ) -> None:
        """Grid n_blocks. Nothing survives in a block of which no token takes part."""
        counts = cuda.shared.array(threads, np.int64)
        alive = cuda.shared.array(threads, np.uint8)
        t, n_block = cuda.threadIdx.x, cuda.blockIdx.x
        n0 = n_block * block_n

        alive[t] = 0
        for position in range(n0 + t, min(n0 + block_n, tokens.n_valid[0]), threads):
            if takes_part(weights, tokens.listed[position]):
                alive[t] = 1
        cuda.syncthreads()
        any_alive = 0
        for other in range(threads):
            any_alive |= alive[other]

        v0, v1 = columns.v0, columns.v1
        part = (v1 - v0 + threads - 1) // threads
        first, last = min(v0 + t * part, v1), min(v0 + t * part + part, v1)
        number = 0
        if any_alive:
            for v in range(first, last):
                if survives(survivors, n_block, v):
                    number += 1
        counts[t] = number
        cuda.syncthreads()
        position = 0
        for other in range(t):
            position += counts[other]
        if any_alive:
            for v in range(first, last):
                if survives(survivors, n_block, v):
                    columns.listed[n_block, position] = v
                    position += 1
        if t == threads - 1:
            columns.count[n_block] = position

    return ArrayKernel(list_columns_kernel, block=_THREADS)
