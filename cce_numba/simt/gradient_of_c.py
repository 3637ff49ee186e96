"""dC = G.T @ E of a chunk: complete in one go, since all tokens are there."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda

from cce_numba.launch.array_kernel import ArrayKernel
from cce_numba.launch.kernel import kernel_factory
from cce_numba.simt.numbers import conversions, real_of
from cce_numba.simt.product import make_product, make_step
from cce_numba.simt.records import survives, takes_part
from cce_numba.simt.staging import ALIGNMENT, NO_ROW, Operand, make_column_stager, make_row_stager
from cce_numba.simt.tiles import SimtTiles


@kernel_factory
def make_d_c_kernel(tiles: SimtTiles, dtype: np.dtype, gradient_dtype: np.dtype) -> ArrayKernel:
    """The kernel for `e` of `dtype`. A tile is `block_n` vocabulary entries by `block_v` of the D hidden dimensions."""
    real = real_of(dtype)
    load, _ = conversions(dtype)
    load_real, _ = conversions(np.dtype(real))
    load_gradient, store = conversions(gradient_dtype)
    product = make_product(tiles, real)
    g_stager = make_row_stager(tiles, tiles.block_n, load_real, real, masked=True)
    e_stager = make_column_stager(tiles, tiles.block_v, load, real)
    step, column_of, clear = make_step(tiles, g_stager, e_stager, real), product.column_of, product.clear
    g_shape, e_shape, acc_shape = product.a_shape, product.b_shape, product.acc_shape
    block_n, block_v, block_k = tiles.block_n, tiles.block_v, tiles.block_k
    threads, threads_v, thread_n, thread_v = tiles.threads, tiles.threads_v, tiles.thread_n, tiles.thread_v
    alignment = ALIGNMENT

    def d_c_kernel(
        g: Any,  # (entries of a chunk, N) real: see gradient_of_logits_kernel
        e: Any,  # (N, D)
        columns: Any,  # Columns
        survivors: Any,  # Survivors: of dC, which may be fewer than G has
        tokens: Any,  # Tokens
        weights: Any,  # Weights
        adds: Any,  # bool: to what is in d_c
        d_c: Any,  # (V, D), of which the chunk's rows are to be written, zeros where nothing survives
    ) -> None:
        """Grid (tiles of the chunk, tiles of D)."""
        g_smem = cuda.shared.array(g_shape, real, alignment)
        e_smem = cuda.shared.array(e_shape, real, alignment)
        g_rows = cuda.shared.array(block_n, np.uint32)
        e_rows = cuda.shared.array(block_k, np.uint32)
        any_kept = cuda.shared.array(threads, np.uint8)
        acc = cuda.local.array(acc_shape, real)
        y = cuda.threadIdx.y
        t = y * threads_v + cuda.threadIdx.x
        first, d0, D = columns.v0 + cuda.blockIdx.x * block_n, cuda.blockIdx.y * block_v, e.shape[1]
        n_valid = tokens.n_valid[0]

        clear(acc)
        for n0 in range(0, n_valid, block_n):
            # Which entries of the tile survive in this block of tokens; often none.
            n_block = n0 // block_n
            if columns.count[n_block] == 0:
                continue
            cuda.syncthreads()
            any_kept[t] = 0
            for r in range(t, block_n, threads):
                v = first + r
                g_rows[r] = NO_ROW
                if v < columns.v1 and survives(survivors, n_block, v):
                    g_rows[r] = v - columns.v0
                    any_kept[t] = 1
            cuda.syncthreads()
            kept = 0
            for other in range(min(threads, block_n)):
                kept |= any_kept[other]
            if kept == 0:
                continue

            n1 = min(n0 + block_n, n_valid)
            for k0 in range(n0, n1, block_k):
                cuda.syncthreads()
                for k in range(t, block_k, threads):
                    e_rows[k] = NO_ROW
                    if k0 + k < n1:
                        # G is zero in the row of a token that takes no part, but zero times a NaN in its e would not be.
                        token = tokens.listed[k0 + k]
                        if takes_part(weights, token):
                            e_rows[k] = token
                cuda.syncthreads()
                step(acc, Operand(g, g_rows, g_smem), k0, n1, Operand(e, e_rows, e_smem), d0, D)

        for i in range(thread_n):
            v = first + y * thread_n + i
            if v < columns.v1:
                for j in range(thread_v):
                    d = d0 + column_of(j)
                    if d < D:
                        total = acc[i, j]
                        if adds:
                            total += load_gradient(d_c[v, d])
                        d_c[v, d] = store(total)

    return ArrayKernel(d_c_kernel, block=(tiles.threads_v, tiles.threads_n), ctas=tiles.ctas)
