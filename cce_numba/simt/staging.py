"""How parts of matrices get from global memory into shared memory, where a product of tiles reads them.

A product's sum runs over k, and `block_k` of its terms are staged at a time, as smem[k][x]: for each k the numbers of all rows
(or columns) x of the tile. Either k runs along the rows of the matrix, as in E @ C.T, and the tile's x are rows: a row stager.
Or k picks rows, as in G @ C, and the tile's x run along the row: a column stager.

Each thread first *fetches* some numbers into registers and later *deposits* them in shared memory, so that its loads are on
their way while it computes.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from numba import cuda

from cce_numba.gpu import SIMULATED
from cce_numba.simt.tiles import SimtTiles

PADDING = 4  # elements after each staged row: spreads the transposed stores over the banks, keeps 16-byte alignment
ALIGNMENT = None if SIMULATED else 16  # of staged operands in bytes, for 16-byte reads; the simulator takes no alignment
NO_ROW = np.uint32(0xFFFFFFFF)  # in a list of rows to stage: a row of zeros


class Operand(NamedTuple):
    """A matrix that takes part in a product, and where its part of a tile is staged."""

    source: Any  # (rows, columns) in global memory
    rows: Any  # (n,) uint32 in shared memory: the rows to stage, by number
    smem: Any  # (block_k, at least width) real in shared memory


@functools.cache
def make_row_stager(tiles: SimtTiles, width: int, load: Any, real: Any, masked: bool) -> SimpleNamespace:
    """Stages smem[k][r] = source[rows[r], k0 + k] for r < width.

    Zero for k0 + k >= K and, if `masked`, for rows[r] == NO_ROW. Neighbouring threads read along a row. A thread's loads do
    not wait for each other. Indices are unsigned, since for signed ones Numba adds code that lets them count from the end.

    Args:
        tiles: sizes.
        width: rows of the tile.
        load: device function that turns an element of the source into a number of `real`.
        real: `numpy.float32` or `numpy.float64`.
        masked: whether rows may be NO_ROW.
    """
    block_k, threads, threads_v = tiles.block_k, tiles.threads, tiles.threads_v
    loads = width * block_k // threads

    @cuda.jit(device=True)
    def fetch(values: Any, operand: Any, k0: Any, K: Any) -> None:
        """values (loads,) real, in registers: this thread's share of the terms from k0 on, out of K."""
        source, rows = operand.source, operand.rows
        t = cuda.threadIdx.y * threads_v + cuda.threadIdx.x
        if k0 + block_k <= K:
            for i in range(loads):
                row, k = rows[(i * threads + t) // block_k], np.uint32(k0 + (i * threads + t) % block_k)
                if masked and row == NO_ROW:
                    values[i] = real(0)
                else:
                    values[i] = load(source[row, k])
        else:
            for i in range(loads):
                row, k = rows[(i * threads + t) // block_k], k0 + (i * threads + t) % block_k
                values[i] = real(0)
                if k < K and not (masked and row == NO_ROW):
                    values[i] = load(source[row, k])

    @cuda.jit(device=True)
    def deposit(values: Any, operand: Any) -> None:
        """What was fetched goes to shared memory."""
        smem, t = operand.smem, cuda.threadIdx.y * threads_v + cuda.threadIdx.x
        for i in range(loads):
            smem[(i * threads + t) % block_k, (i * threads + t) // block_k] = values[i]

    return SimpleNamespace(fetch=fetch, deposit=deposit, loads=loads)


@functools.cache
def make_column_stager(tiles: SimtTiles, width: int, load: Any, real: Any) -> SimpleNamespace:
    """Stages smem[k][x] = source[rows[k], x0 + x] for x < width.

    Zero for rows[k] == NO_ROW. Where x0 + x >= X it stages the last element again: such columns of the tile are nobody's.
    Arguments are those of `make_row_stager`; `width`: columns of the tile.
    """
    block_k, threads, threads_v = tiles.block_k, tiles.threads, tiles.threads_v
    loads = width * block_k // threads

    @cuda.jit(device=True)
    def fetch(values: Any, operand: Any, x0: Any, X: Any) -> None:
        """values (loads,) real, in registers: this thread's share of the columns from x0 on, out of X."""
        source, rows = operand.source, operand.rows
        t = cuda.threadIdx.y * threads_v + cuda.threadIdx.x
        for i in range(loads):
            row, x = rows[(i * threads + t) // width], np.uint32(min(x0 + (i * threads + t) % width, X - 1))
            if row == NO_ROW:
                values[i] = real(0)
            else:
                values[i] = load(source[row, x])

    @cuda.jit(device=True)
    def deposit(values: Any, operand: Any) -> None:
        """What was fetched goes to shared memory."""
        smem, t = operand.smem, cuda.threadIdx.y * threads_v + cuda.threadIdx.x
        for i in range(loads):
            smem[(i * threads + t) // width, (i * threads + t) % width] = values[i]

    return SimpleNamespace(fetch=fetch, deposit=deposit, loads=loads)
