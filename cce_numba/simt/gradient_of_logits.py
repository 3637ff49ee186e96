"""G: the surviving logits again, and from them softmax_weight * softmax - target_weight * onehot.

Less uniform_weight * class_weights, where label smoothing goes through a softcap; then all logits survive.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from numba import cuda

from cce_numba.simt.launch import kernel_of
from cce_numba.simt.numbers import conversions
from cce_numba.simt.product import ALIGNMENT, finish_logit, make_logits_tile, make_product
from cce_numba.simt.tiles import SimtTiles


@functools.cache
def make_gradient_of_logits_kernel(tiles: SimtTiles, dtype: np.dtype, bias_dtype: np.dtype, real: Any, uniform: bool) -> Any:
    """Recomputes the surviving logits and turns them into G; `uniform` says whether that has its third term."""
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
        e: Any,  # (N, D)
        c: Any,  # (V, D)
        bias: Any,  # (V,)
        has_bias: Any,  # bool
        targets: Any,  # (N,) int64
        tokens: Any,  # (N,) int64, the first n_valid[0] count
        n_valid: Any,  # (1,) int64
        target_logit: Any,  # (N,)
        lse: Any,  # (N,)
        logit_scale: Any,  # (N,)
        has_scale: Any,  # bool
        softcap: Any,  # 0 for none
        class_weights: Any,  # (V,)
        has_class_weights: Any,  # bool
        softmax_weight: Any,  # (N,)
        target_weight: Any,  # (N,)
        uniform_weight: Any,  # (N,)
        v0: Any,  # the chunk is [v0, v1)
        columns: Any,  # (n_blocks, chunk) int64
        count: Any,  # (n_blocks,) int64
        g: Any,  # (chunk, N)
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
                scale = logit_scale[token] if has_scale else real(1)
                dead = a == 0 and b == 0  # takes no part, not even with a NaN
                if uniform:
                    dead = dead and uniform_weight[token] == 0
                if target_logit[token] != target_logit[token]:
                    a = real(math.nan)  # its target is out of range: the loss is NaN, and so is the gradient
                for j in range(thread_v):
                    column = first + column_of(j)
                    if column < count[n_block]:
                        v = columns[n_block, column]
                        offset = real(0)
                        if has_bias:
                            offset = real(load_bias(bias[v]))
                        z = finish_logit(acc[i, j], offset, scale, softcap)
                        gradient = a * real(math.exp(z - shift))
                        if v == target:
                            gradient -= b
                        if uniform:
                            gradient -= uniform_weight[token] * (class_weights[v] if has_class_weights else real(1))
                        if softcap > 0:
                            gradient *= real(1) - (z / softcap) * (z / softcap)
                        g[v - v0, n0 + row] = real(0) if dead else gradient

    return gradient_of_logits_kernel
