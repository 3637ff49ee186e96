"""The backward: for each chunk of the vocabulary, three products with one owner per output tile, hence no atomics.

    columns       of each block of tokens that survive in the chunk, as a list
    G             the surviving logits again, and from them softmax_weight * softmax - target_weight * onehot
    dC = G.T @ E  of the chunk, complete: all tokens, rounded once, written once
    dE += G @ C   accumulated over chunks, rounded with the last

G is stored column by column, each at its place in the chunk, so both products can pick from it: what did not survive is
neither written nor read.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from numba import cuda

from cce_numba.arguments import Problem
from cce_numba.plan import Gradients, Statistics
from cce_numba.simt.launch import SIMULATED, argument, ceil_div, kernel_of, launch
from cce_numba.simt.numbers import conversions
from cce_numba.simt.product import (
    ALIGNMENT,
    NO_ROW,
    finish_logit,
    make_column_stager,
    make_logits_tile,
    make_product,
    make_row_stager,
)
from cce_numba.simt.tiles import SimtTiles

WORKSPACE_BYTES = 64 * 2**20  # for G
_MAX_CHUNK = 2**21  # a grid has at most 65535 tiles in its second dimension
_LIST_THREADS = 4 if SIMULATED else 128


@functools.cache
def make_list_columns_kernel(tiles: SimtTiles) -> Any:
    """Compacts the survivor bits of each block into a list of columns; threads take contiguous parts, so it is in order."""
    block_n, threads = tiles.block_n, _LIST_THREADS

    @cuda.jit
    def list_columns_kernel(
        survivors: Any,
        keep_all: Any,
        tokens: Any,
        n_valid: Any,
        softmax_weight: Any,
        target_weight: Any,
        v0: Any,
        v1: Any,
        columns: Any,
        count: Any,
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


@functools.cache
def make_gradient_of_logits_kernel(tiles: SimtTiles, dtype: np.dtype, bias_dtype: np.dtype, real: Any) -> Any:
    """Recomputes the surviving logits and turns them into G."""
    load, _ = conversions(dtype)
    load_bias, _ = conversions(bias_dtype)
    product, logits_tile = make_product(tiles, real), make_logits_tile(tiles, load, real)
    column_of = product.column_of
    a_shape, b_shape, acc_shape = product.a_shape, product.b_shape, product.acc_shape
    block_n, block_v, threads, threads_v = tiles.block_n, tiles.block_v, tiles.threads, tiles.threads_v
    thread_n, thread_v = tiles.thread_n, tiles.thread_v
    alignment = ALIGNMENT

    @kernel_of(tiles.threads, tiles.ctas)
    def gradient_of_logits_kernel(
        e: Any,
        c: Any,
        bias: Any,
        has_bias: Any,
        targets: Any,
        tokens: Any,
        n_valid: Any,
        target_logit: Any,
        lse: Any,
        softcap: Any,
        softmax_weight: Any,
        target_weight: Any,
        v0: Any,
        columns: Any,
        count: Any,
        g: Any,
    ) -> None:
        """Grid (n_blocks, tiles of the chunk). g (chunk, N): row = v - v0, column = position in the list of tokens."""
        e_smem = cuda.shared.array(a_shape, real, alignment)
        c_smem = cuda.shared.array(b_shape, real, alignment)
        e_rows = cuda.shared.array(block_n, np.uint32)
        c_rows = cuda.shared.array(block_v, np.uint32)
        acc = cuda.local.array(acc_shape, real)
        y = cuda.threadIdx.y
        t = y * threads_v + cuda.threadIdx.x
        n_block, first = cuda.blockIdx.x, cuda.blockIdx.y * block_v
        n0 = n_block * block_n
        if n0 >= n_valid[0] or first >= count[n_block]:
            return
        for r in range(t, block_n, threads):
            e_rows[r] = tokens[min(n0 + r, n_valid[0] - 1)]
        for r in range(t, block_v, threads):
            c_rows[r] = columns[n_block, min(first + r, count[n_block] - 1)]
        logits_tile(acc, e, e_rows, c, c_rows, e_smem, c_smem)
        for i in range(thread_n):
            row = y * thread_n + i
            if n0 + row < n_valid[0]:
                token = tokens[n0 + row]
                a, b, shift = softmax_weight[token], target_weight[token], lse[token]
                target = targets[token]
                dead = a == 0 and b == 0  # takes no part, not even with a NaN
                if target_logit[token] != target_logit[token]:
                    a = real(math.nan)  # its target is out of range: the loss is NaN, and so is the gradient
                for j in range(thread_v):
                    column = first + column_of(j)
                    if column < count[n_block]:
                        v = columns[n_block, column]
                        offset = real(0)
                        if has_bias:
                            offset = real(load_bias(bias[v]))
                        z = finish_logit(acc[i, j], offset, softcap)
                        gradient = a * real(math.exp(z - shift))
                        if v == target:
                            gradient -= b
                        if softcap > 0:
                            gradient *= real(1) - (z / softcap) * (z / softcap)
                        g[v - v0, n0 + row] = real(0) if dead else gradient

    return gradient_of_logits_kernel


@functools.cache
def make_d_e_kernel(tiles: SimtTiles, dtype: np.dtype, gradient_dtype: np.dtype, real: Any) -> Any:
    """dE += G @ C over the surviving columns of a chunk: a tile is `block_n` tokens by `block_v` hidden ones."""
    load, _ = conversions(dtype)
    load_real, _ = conversions(np.dtype(real))
    _, store = conversions(gradient_dtype)
    product = make_product(tiles, real)
    g_stager = make_column_stager(tiles, tiles.block_n, load_real, real)
    c_stager = make_column_stager(tiles, tiles.block_v, load, real)
    column_of, clear, accumulate = product.column_of, product.clear, product.accumulate
    fetch_g, deposit_g, loads_g = g_stager.fetch, g_stager.deposit, g_stager.loads
    fetch_c, deposit_c, loads_c = c_stager.fetch, c_stager.deposit, c_stager.loads
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
        g: Any,
        c: Any,
        v0: Any,
        columns: Any,
        count: Any,
        tokens: Any,
        n_valid: Any,
        softmax_weight: Any,
        target_weight: Any,
        is_first: Any,
        rounds: Any,
        d_e_sum: Any,
        d_e: Any,
    ) -> None:
        """Grid (n_blocks, tiles of D). Sums over chunks in d_e_sum (N, D), of the compute dtype; `rounds` the last to d_e."""
        g_smem = cuda.shared.array(a_shape, real, alignment)
        c_smem = cuda.shared.array(b_shape, real, alignment)
        g_rows = cuda.shared.array(block_k, np.uint32)
        c_rows = cuda.shared.array(block_k, np.uint32)
        acc = cuda.local.array(acc_shape, real)
        g_next = cuda.local.array(loads_g, real)
        c_next = cuda.local.array(loads_c, real)
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
            fetch_g(g_next, g, g_rows, n0, n_valid[0])
            fetch_c(c_next, c, c_rows, d0, D)
            deposit_g(g_next, g_smem)
            deposit_c(c_next, c_smem)
            cuda.syncthreads()
            accumulate(acc, g_smem, c_smem)
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
                            d_e[token, d] = store(total)
                        else:
                            d_e_sum[token, d] = total

    return d_e_kernel


@functools.cache
def make_d_c_kernel(tiles: SimtTiles, dtype: np.dtype, gradient_dtype: np.dtype, real: Any) -> Any:
    """dC = G.T @ E of a chunk: a tile is `block_n` vocabulary entries by `block_v` hidden ones."""
    load, _ = conversions(dtype)
    load_real, _ = conversions(np.dtype(real))
    _, store = conversions(gradient_dtype)
    product = make_product(tiles, real)
    g_stager = make_row_stager(tiles, tiles.block_n, load_real, real, masked=True)
    e_stager = make_column_stager(tiles, tiles.block_v, load, real)
    column_of, clear, accumulate = product.column_of, product.clear, product.accumulate
    fetch_g, deposit_g, loads_g = g_stager.fetch, g_stager.deposit, g_stager.loads
    fetch_e, deposit_e, loads_e = e_stager.fetch, e_stager.deposit, e_stager.loads
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
        g: Any,
        e: Any,
        v0: Any,
        v1: Any,
        survivors: Any,
        keep_all: Any,
        count: Any,
        tokens: Any,
        n_valid: Any,
        softmax_weight: Any,
        target_weight: Any,
        d_c: Any,
    ) -> None:
        """Grid (tiles of the chunk, tiles of D). Writes all rows [v0, v1) of d_c (V, D), zeros where nothing survived."""
        g_smem = cuda.shared.array(a_shape, real, alignment)
        e_smem = cuda.shared.array(b_shape, real, alignment)
        g_rows = cuda.shared.array(block_n, np.uint32)
        e_rows = cuda.shared.array(block_k, np.uint32)
        any_kept = cuda.shared.array(threads, np.uint8)
        acc = cuda.local.array(acc_shape, real)
        g_next = cuda.local.array(loads_g, real)
        e_next = cuda.local.array(loads_e, real)
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
                fetch_g(g_next, g, g_rows, k0, n1)
                fetch_e(e_next, e, e_rows, d0, D)
                deposit_g(g_next, g_smem)
                deposit_e(e_next, e_smem)
                cuda.syncthreads()
                accumulate(acc, g_smem, e_smem)
        for i in range(thread_n):
            v = first + y * thread_n + i
            if v < v1:
                for j in range(thread_v):
                    d = d0 + column_of(j)
                    if d < D:
                        d_c[v, d] = store(acc[i, j])

    return d_c_kernel


@functools.cache
def make_d_bias_kernel(tiles: SimtTiles, bias_dtype: np.dtype, real: Any) -> Any:
    """dbias = sum of G over the tokens, one thread a column."""
    _, store = conversions(bias_dtype)
    block_n = tiles.block_n

    @cuda.jit
    def d_bias_kernel(
        g: Any,
        v0: Any,
        v1: Any,
        survivors: Any,
        keep_all: Any,
        count: Any,
        n_valid: Any,
        d_bias: Any,
    ) -> None:
        """Writes d_bias[v0:v1] of (V,), zero where nothing survived."""
        v = v0 + cuda.grid(1)
        if v < v1:
            total = real(0)
            for n_block in range((n_valid[0] + block_n - 1) // block_n):
                if count[n_block] > 0 and (keep_all or (survivors[n_block, v >> 3] >> (v & 7)) & 1):
                    block_total = real(0)  # sums of sums: rounding grows with the length of each, not with N
                    for position in range(n_block * block_n, min(n_block * block_n + block_n, n_valid[0])):
                        block_total += g[v - v0, position]
                    total += block_total
            d_bias[v] = store(total)

    return d_bias_kernel


def chunk_of(p: Problem, tiles: SimtTiles) -> int:
    """Vocabulary entries whose G fits in the workspace; at least one tile, whatever N is."""
    tile = max(tiles.block_n, tiles.block_v)
    fitting = min(WORKSPACE_BYTES // (p.compute_dtype.itemsize * max(1, p.N)), _MAX_CHUNK) // tile * tile
    return min(max(tile, 4 * tile if SIMULATED else fitting), ceil_div(p.V, tile) * tile)


def backward(
    p: Problem, tiles: SimtTiles, statistics: Statistics, softmax_weight: Any, target_weight: Any, wrt: frozenset[str]
) -> Gradients:
    """Gradients in their final dtypes; None where not in `wrt`."""
    xp: Any = p.xp
    real: Any = p.compute_dtype.type
    d_e = xp.zeros((p.N, p.D), p.grad_e_dtype) if "e" in wrt else None
    written = xp.empty if p.N else xp.zeros  # by the kernels, in full, if any are launched
    d_c = written((p.V, p.D), p.grad_c_dtype) if "c" in wrt else None
    d_bias = written(p.V, p.bias.dtype) if "bias" in wrt else None
    if p.N == 0:
        return Gradients(d_e, d_c, d_bias)
    n_blocks, chunk = ceil_div(p.N, tiles.block_n), chunk_of(p, tiles)
    keep_all_e, keep_all_c = p.options.filter_eps_e is None, p.options.filter_eps_c is None
    exact_g = (d_e is not None and keep_all_e) or ((d_c is not None or d_bias is not None) and keep_all_c)
    # A gradient of the compute dtype is its own sum; one that must be rounded has a sum beside it, if there are chunks.
    sums_itself = p.grad_e_dtype == p.compute_dtype
    d_e_sum = d_e if sums_itself else xp.empty((p.N, p.D) if chunk < p.V else (1, 1), p.compute_dtype)
    d_e_rounded = xp.empty((1, 1), p.grad_e_dtype) if sums_itself else d_e

    # Kernels take these again and again.
    e, c, targets, target_logit, lse = map(argument, (p.e, p.c, p.targets, statistics.target_logit, statistics.lse))
    tokens, n_valid = argument(statistics.tokens), argument(statistics.n_valid.reshape(1))
    survivors = argument(xp.zeros((1, 1), np.uint8) if statistics.survivors is None else statistics.survivors)
    g = argument(xp.empty((chunk, p.N), p.compute_dtype))
    weights = argument(softmax_weight), argument(target_weight)
    bias = argument(xp.zeros(1, p.dtype) if p.bias is None else p.bias)
    bias_dtype = p.dtype if p.bias is None else np.dtype(p.bias.dtype)
    # One pair of lists for G, and another for dE where it is filtered and dC is not.
    lists = [(argument(xp.empty((n_blocks, chunk), np.int64)), argument(xp.zeros(n_blocks, np.int64)))]
    if d_e is not None and keep_all_e != exact_g:
        lists.append((argument(xp.empty((n_blocks, chunk), np.int64)), argument(xp.zeros(n_blocks, np.int64))))
    block, D_tiles = (tiles.threads_v, tiles.threads_n), ceil_div(p.D, tiles.block_v)

    for v0 in range(0, p.V, chunk):
        v1 = min(v0 + chunk, p.V)
        for (columns, count), keep_all in zip(lists, (exact_g, keep_all_e), strict=False):
            launch(
                make_list_columns_kernel(tiles),
                (n_blocks,),
                (_LIST_THREADS,),
                *(survivors, keep_all, tokens, n_valid, *weights, v0, v1, columns, count),
            )
        columns, count = lists[0]
        launch(
            make_gradient_of_logits_kernel(tiles, p.dtype, bias_dtype, real),
            (n_blocks, ceil_div(v1 - v0, tiles.block_v)),
            block,
            *(
                e,
                c,
                bias,
                p.bias is not None,
                targets,
                tokens,
                n_valid,
                target_logit,
                lse,
                real(p.options.softcap or 0),
            ),
            *(*weights, v0, columns, count, g),
        )
        if d_e is not None:
            launch(
                make_d_e_kernel(tiles, p.dtype, p.grad_e_dtype, real),
                (n_blocks, D_tiles),
                block,
                *(g, c, v0, *lists[-1], tokens, n_valid, *weights),
                *(v0 == 0, v1 == p.V and not sums_itself, d_e_sum, d_e_rounded),
            )
        if d_c is not None:
            launch(
                make_d_c_kernel(tiles, p.dtype, p.grad_c_dtype, real),
                (ceil_div(v1 - v0, tiles.block_n), D_tiles),
                block,
                *(g, e, v0, v1, survivors, keep_all_c, count, tokens, n_valid, *weights, d_c),
            )
        if d_bias is not None:
            launch(
                make_d_bias_kernel(tiles, bias_dtype, real),
                (ceil_div(v1 - v0, tiles.block_n),),
                (tiles.block_n,),
                *(g, v0, v1, survivors, keep_all_c, count, n_valid, d_bias),
            )
    return Gradients(d_e, d_c, d_bias)
