"""The one building block of all large kernels here: a tile of a matrix product in registers, fed through shared memory.

A CTA's threads stand in a (threads_n, threads_v) grid. Thread (y, x) computes rows y * thread_n + i of the tile, for i <
thread_n, and thread_v columns, in groups of `vector` neighbours: group g starts at column (g * threads_v + x) * vector, so that
the threads of a warp read neighbouring 16-byte words of shared memory. The sum runs over k, `block_k` terms at a time:

    fetch the first terms of A and B into registers
    repeat:  barrier | deposit them in shared memory as A[k][row] and B[k][column] | barrier
             fetch the next terms, which travel while this happens: accumulate the outer products of the staged ones

`staging.py` fetches and deposits. No warp-level operation is used, so that the same source runs in Numba's simulator.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

from numba import cuda

from cce_numba.simt.staging import PADDING
from cce_numba.simt.tiles import SimtTiles


@functools.cache
def make_product(tiles: SimtTiles, real: Any) -> SimpleNamespace:
    """Device functions for tiles of this size in `real` (numpy.float32 or float64), and the shapes of what they work on.

    acc_shape is that of a thread's accumulators, in registers; a_shape and b_shape are those of the staged operands.
    """
    block_k, thread_n, thread_v = tiles.block_k, tiles.thread_n, tiles.thread_v
    vector, threads_v = tiles.vector, tiles.threads_v

    @cuda.jit(device=True)
    def column_of(j: Any) -> Any:
        """The tile column of this thread's j-th."""
        return (j // vector * threads_v + cuda.threadIdx.x) * vector + j % vector

    @cuda.jit(device=True)
    def clear(acc: Any) -> None:
        """Zeros the accumulators."""
        for i in range(thread_n):
            for j in range(thread_v):
                acc[i, j] = real(0)

    @cuda.jit(device=True)
    def accumulate_term(acc: Any, a_smem: Any, b_smem: Any, k: Any) -> None:
        """Adds the outer product of the k-th staged terms."""
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
        a_shape=(block_k, tiles.block_n + PADDING),
        b_shape=(block_k, tiles.block_v + PADDING),
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
        """The first half of the terms, then the second."""
        first(acc, a_smem, b_smem, k)
        second(acc, a_smem, b_smem, k + half)

    return both


def make_step(tiles: SimtTiles, a_stager: SimpleNamespace, b_stager: SimpleNamespace, real: Any) -> Any:
    """The device function that adds `block_k` terms to a tile of a product: stage both operands, then accumulate."""
    accumulate = make_product(tiles, real).accumulate
    fetch_a, deposit_a, loads_a = a_stager.fetch, a_stager.deposit, a_stager.loads
    fetch_b, deposit_b, loads_b = b_stager.fetch, b_stager.deposit, b_stager.loads

    @cuda.jit(device=True)
    def step(acc: Any, a: Any, a0: Any, A: Any, b: Any, b0: Any, B: Any) -> None:
        """Adds to acc (thread_n, thread_v). a, b: an `Operand` each, staged from a0 and b0 on, out of A and B numbers.

        The lists of rows must be visible before, and nobody may still read the staged operands of the last step.
        """
        a_next = cuda.local.array(loads_a, real)
        b_next = cuda.local.array(loads_b, real)
        fetch_a(a_next, a, a0, A)
        fetch_b(b_next, b, b0, B)
        deposit_a(a_next, a)
        deposit_b(b_next, b)
        cuda.syncthreads()
        accumulate(acc, a.smem, b.smem)

    return step
