"""The survivor bits of a chunk of the vocabulary, compacted to a list of columns for each block of tokens."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import cuda

from cce_numba.gpu import SIMULATED
from cce_numba.simt.tiles import SimtTiles

LIST_THREADS = 4 if SIMULATED else 128


@functools.cache
def make_list_columns_kernel(tiles: SimtTiles) -> Any:
    """Compacts the survivor bits of each block into a list of columns; threads take contiguous parts, so it is in order."""
    block_n, threads = tiles.block_n, LIST_THREADS

    @cuda.jit
    def list_columns_kernel(
        survivors: Any,  # (n_blocks, ceil(V / 8)) uint8
        keep_all: Any,  # bool
        tokens: Any,  # (N,) int64, the first n_valid[0] count
        n_valid: Any,  # (1,) int64
        softmax_weight: Any,  # (N,)
        target_weight: Any,  # (N,)
        v0: Any,  # the chunk is [v0, v1)
        v1: Any,
        columns: Any,  # (n_blocks, chunk) int64
        count: Any,  # (n_blocks,) int64
    ) -> None:
        """Grid n_blocks. columns (n_blocks, >= v1 - v0): surviving entries of [v0, v1), count[n_block] of them.

        Everything survives with keep_all, and nothing in a block whose tokens all have zero weights.
        """
        counts = cuda.shared.array(threads, np.int64)
        alive = cuda.shared.array(threads, np.uint8)
        t, n_block = cuda.threadIdx.x, cuda.blockIdx.x
        alive[t] = 0
        for position in range(n_block * block_n + t, min(n_block * block_n + block_n, n_valid[0]), threads):
            token = tokens[position]
            if softmax_weight[token] != 0 or target_weight[token] != 0:
                alive[t] = 1
        cuda.syncthreads()
        any_alive = 0
        for other in range(threads):
            any_alive |= alive[other]
        part = (v1 - v0 + threads - 1) // threads
        first, last = min(v0 + t * part, v1), min(v0 + t * part + part, v1)
        number = 0
        if any_alive:
            for v in range(first, last):
                if keep_all or (survivors[n_block, v >> 3] >> (v & 7)) & 1:
                    number += 1
        counts[t] = number
        cuda.syncthreads()
        position = 0
        for other in range(t):
            position += counts[other]
        if any_alive:
            for v in range(first, last):
                if keep_all or (survivors[n_block, v >> 3] >> (v & 7)) & 1:
                    columns[n_block, position] = v
                    position += 1
        if t == threads - 1:
            count[n_block] = position

    return list_columns_kernel
