"""The gradients from G, each element with one owner: dE += G @ C, dC = G.T @ E, dbias = sum of G over the tokens."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import cuda

from cce_numba.simt.launch import kernel_of
from cce_numba.simt.numbers import conversions
from cce_numba.simt.product import ALIGNMENT, NO_ROW, make_column_stager, make_product, make_row_stager
from cce_numba.simt.tiles import SimtTiles


def make_step(tiles: SimtTiles, a_stager: Any, b_stager: Any, real: Any) -> Any:
    """The device function that adds `block_k` terms to a tile of a product: stage both operands, then accumulate."""
    accumulate = make_product(tiles, real).accumulate
    fetch_a, deposit_a, loads_a = a_stager.fetch, a_stager.deposit, a_stager.loads
    fetch_b, deposit_b, loads_b = b_stager.fetch, b_stager.deposit, b_stager.loads

    @cuda.jit(device=True)
    def step(
        acc: Any, a: Any, a_rows: Any, a0: Any, A: Any, a_smem: Any, b: Any, b_rows: Any, b0: Any, B: Any, b_smem: Any
    ) -> None:
        """The lists of rows must be visible before, and nobody may still read the staged operands of the last step."""
        a_next = cuda.local.array(loads_a, real)
        b_next = cuda.local.array(loads_b, real)
        fetch_a(a_next, a, a_rows, a0, A)
        fetch_b(b_next, b, b_rows, b0, B)
        deposit_a(a_next, a_smem)
        deposit_b(b_next, b_smem)
        cuda.syncthreads()
        accumulate(acc, a_smem, b_smem)

    return step


@functools.cache
def make_d_e_kernel(tiles: SimtTiles, dtype: np.dtype, gradient_dtype: np.dtype, real: Any) -> Any:
    """dE += G @ C over the surviving columns of a chunk: a tile is `block_n` tokens by `block_v` hidden ones."""
    load, _ = conversions(dtype)
    load_real, _ = conversions(np.dtype(real))
    load_gradient, store = conversions(gradient_dtype)
    product = make_product(tiles, real)
    g_stager = make_column_stager(tiles, tiles.block_n, load_real, real)
    c_stager = make_column_stager(tiles, tiles.block_v, load, real)
    step = make_step(tiles, g_stager, c_stager, real)
    column_of, clear = product.column_of, product.clear
    a_shape, b_shape, acc_shape = product.a_shape, product.b_shape, product.acc_shape
    block_n, block_v, block_k, threads, threads_v = (
        tiles.block_n,
        tiles.block_v,
        tiles.block_k,
        tiles.threads,
        tiles.threads_v,
    )
    thread_n, thread_v = tiles.thread_n, tiles.thread_v
    alignment = ALIGNMENT

    @kernel_of(tiles.threads, tiles.ctas)
    def d_e_kernel(
        g: Any,  # (chunk, N)
        c: Any,  # (V, D)
        v0: Any,  # the chunk is [v0, v1)
        columns: Any,  # (n_blocks, chunk) int64
        count: Any,  # (n_blocks,) int64
        tokens: Any,  # (N,) int64, the first n_valid[0] count
        n_valid: Any,  # (1,) int64
        softmax_weight: Any,  # (N,)
        target_weight: Any,  # (N,)
        is_first: Any,  # bool
        rounds: Any,  # bool
        adds: Any,  # bool
        d_e_sum: Any,  # (N, D)
        d_e: Any,  # (N, D)
    ) -> None:
        """Grid (n_blocks, tiles of D). Sums over chunks in d_e_sum (N, D), of the compute dtype; `rounds` the last to d_e.

        `is_first` does not read d_e_sum. `adds` what is in d_e before it is rounded.
        """
        g_smem = cuda.shared.array(a_shape, real, alignment)
        c_smem = cuda.shared.array(b_shape, real, alignment)
        g_rows = cuda.shared.array(block_k, np.uint32)
        c_rows = cuda.shared.array(block_k, np.uint32)
        acc = cuda.local.array(acc_shape, real)
        y = cuda.threadIdx.y
        t = y * threads_v + cuda.threadIdx.x
        n_block, d0, D = cuda.blockIdx.x, cuda.blockIdx.y * block_v, c.shape[1]
        n0, K = n_block * block_n, count[n_block]
        if n0 >= n_valid[0]:
            return
        clear(acc)
        for k0 in range(0, K, block_k):
            cuda.syncthreads()
            for k in range(t, block_k, threads):
                c_rows[k], g_rows[k] = NO_ROW, NO_ROW
                if k0 + k < K:
                    v = columns[n_block, k0 + k]
                    c_rows[k], g_rows[k] = v, v - v0
            cuda.syncthreads()
            step(acc, g, g_rows, n0, n_valid[0], g_smem, c, c_rows, d0, D, c_smem)
        for i in range(thread_n):
            position = n0 + y * thread_n + i
            if position < n_valid[0]:
                token = tokens[position]
                # G is zero in a row without weights, but zero times a NaN in c is not.
                dead = softmax_weight[token] == 0 and target_weight[token] == 0
                for j in range(thread_v):
                    d = d0 + column_of(j)
                    if d < D:
                        total = real(0) if dead else acc[i, j]
                        if not is_first:
                            total += d_e_sum[token, d]
                        if rounds:
                            if adds:
                                total += load_gradient(d_e[token, d])
                            d_e[token, d] = store(total)
                        else:
                            d_e_sum[token, d] = total

    return d_e_kernel


@functools.cache
def make_d_c_kernel(tiles: SimtTiles, dtype: np.dtype, gradient_dtype: np.dtype, real: Any) -> Any:
    """dC = G.T @ E of a chunk: a tile is `block_n` vocabulary entries by `block_v` hidden ones."""
    load, _ = conversions(dtype)
    load_real, _ = conversions(np.dtype(real))
    load_gradient, store = conversions(gradient_dtype)
    product = make_product(tiles, real)
    g_stager = make_row_stager(tiles, tiles.block_n, load_real, real, masked=True)
    e_stager = make_column_stager(tiles, tiles.block_v, load, real)
    step = make_step(tiles, g_stager, e_stager, real)
    column_of, clear = product.column_of, product.clear
    a_shape, b_shape, acc_shape = product.a_shape, product.b_shape, product.acc_shape
    block_n, block_v, block_k, threads, threads_v = (
        tiles.block_n,
        tiles.block_v,
        tiles.block_k,
        tiles.threads,
        tiles.threads_v,
    )
    thread_n, thread_v = tiles.thread_n, tiles.thread_v
    alignment = ALIGNMENT

    @kernel_of(tiles.threads, tiles.ctas)
    def d_c_kernel(
        g: Any,  # (chunk, N)
        e: Any,  # (N, D)
        v0: Any,  # the chunk is [v0, v1)
        v1: Any,
        survivors: Any,  # (n_blocks, ceil(V / 8)) uint8
        keep_all: Any,  # bool
        count: Any,  # (n_blocks,) int64
        tokens: Any,  # (N,) int64, the first n_valid[0] count
        n_valid: Any,  # (1,) int64
        softmax_weight: Any,  # (N,)
        target_weight: Any,  # (N,)
        adds: Any,  # bool
        d_c: Any,  # (V, D)
    ) -> None:
        """Grid (tiles of the chunk, tiles of D). Writes all rows [v0, v1) of d_c (V, D), zeros where nothing survived.

        Or `adds` to what is there.
        """
        g_smem = cuda.shared.array(a_shape, real, alignment)
        e_smem = cuda.shared.array(b_shape, real, alignment)
        g_rows = cuda.shared.array(block_n, np.uint32)
        e_rows = cuda.shared.array(block_k, np.uint32)
        any_kept = cuda.shared.array(threads, np.uint8)
        acc = cuda.local.array(acc_shape, real)
        y = cuda.threadIdx.y
        t = y * threads_v + cuda.threadIdx.x
        first, d0, D = v0 + cuda.blockIdx.x * block_n, cuda.blockIdx.y * block_v, e.shape[1]
        clear(acc)
        for n0 in range(0, n_valid[0], block_n):
            n_block = n0 // block_n
            if count[n_block] == 0:
                continue
            cuda.syncthreads()
            any_kept[t] = 0
            for r in range(t, block_n, threads):
                v = first + r
                g_rows[r] = NO_ROW
                if v < v1 and (keep_all or (survivors[n_block, v >> 3] >> (v & 7)) & 1):
                    g_rows[r] = v - v0
                    any_kept[t] = 1
            cuda.syncthreads()
            kept = 0
            for other in range(min(threads, block_n)):
                kept |= any_kept[other]
            if kept == 0:
                continue  # none of the tile's entries survives in this block of tokens
            n1 = min(n0 + block_n, n_valid[0])
            for k0 in range(n0, n1, block_k):
                cuda.syncthreads()
                for k in range(t, block_k, threads):
                    e_rows[k] = NO_ROW
                    if k0 + k < n1:
                        token = tokens[k0 + k]
                        # G is zero in a row without weights, but zero times a NaN in its e would not be.
                        if softmax_weight[token] != 0 or target_weight[token] != 0:
                            e_rows[k] = token
                cuda.syncthreads()
                step(acc, g, g_rows, k0, n1, g_smem, e, e_rows, d0, D, e_smem)
        for i in range(thread_n):
            v = first + y * thread_n + i
            if v < v1:
                for j in range(thread_v):
                    d = d0 + column_of(j)
                    if d < D:
                        total = acc[i, j]
                        if adds:
                            total += load_gradient(d_c[v, d])
                        d_c[v, d] = store(total)

    return d_c_kernel


@functools.cache
def make_d_bias_kernel(tiles: SimtTiles, gradient_dtype: np.dtype, real: Any) -> Any:
    """dbias = sum of G over the tokens, one thread a column."""
    load_gradient, store = conversions(gradient_dtype)
    block_n = tiles.block_n

    @cuda.jit
    def d_bias_kernel(
        g: Any,  # (chunk, N)
        v0: Any,  # the chunk is [v0, v1)
        v1: Any,
        survivors: Any,  # (n_blocks, ceil(V / 8)) uint8
        keep_all: Any,  # bool
        count: Any,  # (n_blocks,) int64
        n_valid: Any,  # (1,) int64
        adds: Any,  # bool
        d_bias: Any,  # (V,)
    ) -> None:
        """Writes d_bias[v0:v1] of (V,), zero where nothing survived, or `adds` to what is there."""
        v = v0 + cuda.grid(1)
        if v < v1:
            total = real(0)
            for n_block in range((n_valid[0] + block_n - 1) // block_n):
                if count[n_block] > 0 and (keep_all or (survivors[n_block, v >> 3] >> (v & 7)) & 1):
                    block_total = real(0)  # sums of sums: rounding grows with the length of each, not with N
                    for position in range(n_block * block_n, min(n_block * block_n + block_n, n_valid[0])):
                        block_total += g[v - v0, position]
                    total += block_total
            if adds:
                total += load_gradient(d_bias[v])
            d_bias[v] = store(total)

    return d_bias_kernel
