"""dE += G @ C over the surviving columns of a chunk."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import cuda

from cce_numba.launch.array_kernel import ArrayKernel
from cce_numba.launch.kernel import kernel_factory
from cce_numba.simt.numbers import conversions, real_of
from cce_numba.simt.product import make_product, make_step
from cce_numba.simt.records import takes_part
from cce_numba.simt.staging import ALIGNMENT, NO_ROW, Operand, make_column_stager
from cce_numba.simt.tiles import SimtTiles


class Destination(NamedTuple):
    """Where dE is summed over the chunks, and where it goes with the last of them."""

    sum: Any  # (N, D) real: the sum over chunks; d_e itself where that is of the same dtype
    d_e: Any  # (N, D) of the gradient's dtype, if it is another one
    starts: Any  # bool: the sum holds nothing yet
    rounds: Any  # bool: this is the last chunk, and the sum goes to d_e
    adds: Any  # bool: what is in d_e is added before it is rounded


@kernel_factory
def make_d_e_kernel(tiles: SimtTiles, dtype: np.dtype, gradient_dtype: np.dtype) -> ArrayKernel:
    """The kernel for `c` of `dtype`. A tile is `block_n` tokens by `block_v` of the D hidden dimensions."""
    real = real_of(dtype)
    load, _ = conversions(dtype)
    load_real, _ = conversions(np.dtype(real))
    load_gradient, store = conversions(gradient_dtype)
    product = make_product(tiles, real)
    g_stager = make_column_stager(tiles, tiles.block_n, load_real, real)
    c_stager = make_column_stager(tiles, tiles.block_v, load, real)
    step, column_of, clear = make_step(tiles, g_stager, c_stager, real), product.column_of, product.clear
    g_shape, c_shape, acc_shape = product.a_shape, product.b_shape, product.acc_shape
    block_n, block_v, block_k = tiles.block_n, tiles.block_v, tiles.block_k
    threads, threads_v, thread_n, thread_v = tiles.threads, tiles.threads_v, tiles.thread_n, tiles.thread_v
    alignment = ALIGNMENT

    def d_e_kernel(
        g: Any,  # (entries of a chunk, N) real: see gradient_of_logits_kernel
        c: Any,  # (V, D)
        columns: Any,  # Columns
        tokens: Any,  # Tokens
        weights: Any,  # Weights
        into: Any,  # Destination
    ) -> None:
        """Grid (n_blocks, tiles of D). Writes the rows of tokens that count, zeros for those that take no part."""
        g_smem = cuda.shared.array(g_shape, real, alignment)
        c_smem = cuda.shared.array(c_shape, real, alignment)
        g_rows = cuda.shared.array(block_k, np.uint32)
        c_rows = cuda.shared.array(block_k, np.uint32)
        acc = cuda.local.array(acc_shape, real)
        y = cuda.threadIdx.y
        t = y * threads_v + cuda.threadIdx.x
        n_block, d0, D = cuda.blockIdx.x, cuda.blockIdx.y * block_v, c.shape[1]
        n0, n_valid, count = n_block * block_n, tokens.n_valid[0], columns.count[n_block]
        if n0 >= n_valid:
            return

        clear(acc)
        for k0 in range(0, count, block_k):
            cuda.syncthreads()
            for k in range(t, block_k, threads):
                c_rows[k], g_rows[k] = NO_ROW, NO_ROW
                if k0 + k < count:
                    v = columns.listed[n_block, k0 + k]
                    c_rows[k], g_rows[k] = v, v - columns.v0
            cuda.syncthreads()
            step(acc, Operand(g, g_rows, g_smem), n0, n_valid, Operand(c, c_rows, c_smem), d0, D)

        for i in range(thread_n):
            position = n0 + y * thread_n + i
            if position < n_valid:
                token = tokens.listed[position]
                # G is zero in the row of a token that takes no part, but zero times a NaN in c is not.
                dead = not takes_part(weights, token)
                for j in range(thread_v):
                    d = d0 + column_of(j)
                    if d < D:
                        total = real(0) if dead else acc[i, j]
                        if not into.starts:
                            total += into.sum[token, d]
                        if into.rounds:
                            if into.adds:
                                total += load_gradient(into.d_e[token, d])
                            into.d_e[token, d] = store(total)
                        else:
                            into.sum[token, d] = total

    return ArrayKernel(d_e_kernel, block=(tiles.threads_v, tiles.threads_n), ctas=tiles.ctas)
