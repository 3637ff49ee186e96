"""The one building block of all large kernels here: a tile of a matrix product in registers, fed through shared memory.

A CTA's threads stand in a (threads_n, threads_v) grid. Thread (y, x) computes rows y * thread_n + i, and columns in groups
of `vector` neighbours: group g of them starts at (g * threads_v + x) * vector, so that the threads of a warp read
neighbouring 16-byte words of shared memory. The sum runs over k, `block_k` terms at a time:

    fetch the first terms of A and B into registers
    repeat:  barrier | deposit them in shared memory as A[k][row] and B[k][column] | barrier
             fetch the next terms, which travel while this happens: accumulate the outer products of the staged ones

No warp-level operation is used, so that the same source runs in Numba's simulator.
"""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
from numba import cuda

from cce_numba.gpu import SIMULATED
from cce_numba.simt.tiles import SimtTiles

_PADDING = 4  # elements after each staged row: spreads the transposed stores over the banks, keeps 16-byte alignment
NO_ROW = np.uint32(0xFFFFFFFF)  # in a list of rows to stage: a row of zeros
ALIGNMENT = None if SIMULATED else 16  # of shared memory, for 16-byte reads; the simulator takes no alignment


@functools.cache
def make_product(tiles: SimtTiles, real: Any) -> SimpleNamespace:
    """Device functions for tiles of this size in `real` (numpy.float32 or float64), and the shapes of what they work on."""
    block_k, thread_n, thread_v, vector, threads_v = (
        tiles.block_k,
        tiles.thread_n,
        tiles.thread_v,
        tiles.vector,
        tiles.threads_v,
    )

    @cuda.jit(device=True)
    def column_of(j: Any) -> Any:
        """The tile column of this thread's j-th."""
        return (j // vector * threads_v + cuda.threadIdx.x) * vector + j % vector

    @cuda.jit(device=True)
    def clear(acc: Any) -> None:
        for i in range(thread_n):
            for j in range(thread_v):
                acc[i, j] = real(0)

    @cuda.jit(device=True)
    def accumulate_term(acc: Any, a_smem: Any, b_smem: Any, k: Any) -> None:
        a = cuda.local.array(thread_n, real)
        b = cuda.local.array(thread_v, real)
        row, column = cuda.threadIdx.y * thread_n, cuda.threadIdx.x * vector
        for i in range(thread_n):
            a[i] = a_smem[k, row + i]
        for j in range(thread_v):
            b[j] = b_smem[k, j // vector * (threads_v * vector) + column + j % vector]
        for i in range(thread_n):
            for j in range(thread_v):
                acc[i, j] += a[i] * b[j]

    accumulate_terms = _unrolled(accumulate_term, block_k)

    @cuda.jit(device=True)
    def accumulate(acc: Any, a_smem: Any, b_smem: Any) -> None:
        """acc (thread_n, thread_v) += the outer products of the staged terms. Barriers are the caller's."""
        accumulate_terms(acc, a_smem, b_smem, 0)

    return SimpleNamespace(
        column_of=column_of,
        clear=clear,
        accumulate=accumulate,
        acc_shape=(thread_n, thread_v),
        a_shape=(block_k, tiles.block_n + _PADDING),
        b_shape=(block_k, tiles.block_v + _PADDING),
    )


def _unrolled(term: Any, times: int) -> Any:
    """The device function that runs `term` for k, k + 1, ... k + times - 1, without a loop.

    The compiler leaves a loop over so long a body rolled up, and then spends a third of its instructions on indices.
    """
    if times == 1:
        return term
    first, second, half = _unrolled(term, times // 2), _unrolled(term, times - times // 2), times // 2

    @cuda.jit(device=True)
    def both(acc: Any, a_smem: Any, b_smem: Any, k: Any) -> None:
        first(acc, a_smem, b_smem, k)
        second(acc, a_smem, b_smem, k + half)

    return both


@functools.cache
def make_row_stager(tiles: SimtTiles, width: int, load: Any, real: Any, masked: bool) -> SimpleNamespace:
    """Stages smem[k][r] = source[rows[r], k0 + k] for r < width: rows of the source, along which the sum runs.

    Zero for k0 + k >= K and, if `masked`, for rows[r] == NO_ROW. Neighbouring threads read along a row. A thread's loads do
    not wait for each other. Indices are unsigned, since for signed ones Numba adds code that lets them count from the end.
    """
    block_k, threads, threads_v = tiles.block_k, tiles.threads, tiles.threads_v
    loads = width * block_k // threads

    @cuda.jit(device=True)
    def fetch(values: Any, source: Any, rows: Any, k0: Any, K: Any) -> None:
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
    def deposit(values: Any, smem: Any) -> None:
        t = cuda.threadIdx.y * threads_v + cuda.threadIdx.x
        for i in range(loads):
            smem[(i * threads + t) % block_k, (i * threads + t) // block_k] = values[i]

    return SimpleNamespace(fetch=fetch, deposit=deposit, loads=loads)


@functools.cache
def make_column_stager(tiles: SimtTiles, width: int, load: Any, real: Any) -> SimpleNamespace:
    """Stages smem[k][x] = source[rows[k], x0 + x] for x < width: the sum runs over rows of the source, which are picked.

    Zero for rows[k] == NO_ROW. Where x0 + x >= X it stages the last element again: such columns of the tile are nobody's.
    """
    block_k, threads, threads_v = tiles.block_k, tiles.threads, tiles.threads_v
    loads = width * block_k // threads

    @cuda.jit(device=True)
    def fetch(values: Any, source: Any, rows: Any, x0: Any, X: Any) -> None:
        t = cuda.threadIdx.y * threads_v + cuda.threadIdx.x
        for i in range(loads):
            row, x = rows[(i * threads + t) // width], np.uint32(min(x0 + (i * threads + t) % width, X - 1))
            if row == NO_ROW:
                values[i] = real(0)
            else:
                values[i] = load(source[row, x])

    @cuda.jit(device=True)
    def deposit(values: Any, smem: Any) -> None:
        t = cuda.threadIdx.y * threads_v + cuda.threadIdx.x
        for i in range(loads):
            smem[(i * threads + t) // width, (i * threads + t) % width] = values[i]

    return SimpleNamespace(fetch=fetch, deposit=deposit, loads=loads)


@functools.cache
def make_logits_tile(tiles: SimtTiles, load: Any, real: Any) -> Any:
    """The device function that computes a tile of E @ C.T, for rows of both that are picked by index."""
    product = make_product(tiles, real)
    e_stager = make_row_stager(tiles, tiles.block_n, load, real, masked=False)
    c_stager = make_row_stager(tiles, tiles.block_v, load, real, masked=False)
    clear, accumulate, block_k = product.clear, product.accumulate, tiles.block_k
    fetch_e, deposit_e, loads_e = e_stager.fetch, e_stager.deposit, e_stager.loads
    fetch_c, deposit_c, loads_c = c_stager.fetch, c_stager.deposit, c_stager.loads

    @cuda.jit(device=True)
    def logits_tile(acc: Any, e: Any, e_rows: Any, c: Any, c_rows: Any, e_smem: Any, c_smem: Any) -> None:
        """acc = <e[e_rows[n]], c[c_rows[v]]> for this thread's n and v. Starts and ends with a barrier.

        e_rows (block_n,), c_rows (block_v,): uint32 in shared memory, all of them rows that exist.
        """
        e_next = cuda.local.array(loads_e, real)
        c_next = cuda.local.array(loads_c, real)
        D = e.shape[1]
        clear(acc)
        cuda.syncthreads()
        fetch_e(e_next, e, e_rows, 0, D)
        fetch_c(c_next, c, c_rows, 0, D)
        for d0 in range(0, D, block_k):
            cuda.syncthreads()
            deposit_e(e_next, e_smem)
            deposit_c(c_next, c_smem)
            cuda.syncthreads()
            if d0 + block_k < D:
                fetch_e(e_next, e, e_rows, d0 + block_k, D)
                fetch_c(c_next, c, c_rows, d0 + block_k, D)
            accumulate(acc, e_smem, c_smem)
        cuda.syncthreads()

    return logits_tile


@cuda.jit(device=True)
def finish_logit(z: Any, bias: Any, scale: Any, softcap: Any) -> Any:
    """A product becomes a logit: plus bias, scaled, then capped (softcap 0 caps nothing)."""
    z = (z + bias) * scale
    if softcap > 0:
        z = softcap * math.tanh(z / softcap)
    return z
