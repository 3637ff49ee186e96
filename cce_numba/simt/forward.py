"""The forward: tiles of logits live in registers and fold into a running (max, sum) per token (paper section 4.2).

A CTA owns `block_n` tokens and a range of vocabulary tiles; `splits` CTAs share a block of tokens where those alone would
not fill the GPU, and `finish_kernel` merges what they found. On the way each CTA notes the survivors: columns that some
token of the block may give a probability of at least eps, which is all that the backward will look at.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from numba import cuda

from cce_numba.arguments import Problem
from cce_numba.backend import Statistics
from cce_numba.integers import ceil_div
from cce_numba.simt.indexed_dot import indexed_dot
from cce_numba.simt.launch import kernel_of, launch, multiprocessors
from cce_numba.simt.numbers import conversions
from cce_numba.simt.product import ALIGNMENT, finish_logit, make_logits_tile, make_product
from cce_numba.simt.tiles import SimtTiles
from cce_numba.simt.tokens import list_tokens
from cce_numba.survivors import RELATIVE_SLACK, log_threshold

# With survivors, this part of the vocabulary goes first and gives all CTAs a bound for the rest, where else each would know
# only what it has seen itself. Tokenizers give the frequent entries the first numbers. On real text (V = 49152, eps = 2^-16,
# 32 splits) that flags 40 % of the columns instead of 85 %, where 32 % survive in truth.
_HEAD = 8


@functools.cache
def make_lse_kernel(tiles: SimtTiles, dtype: np.dtype, bias_dtype: np.dtype, real: Any, with_mean: bool) -> Any:
    """The kernel for `e` and `c` of `dtype`, computing in `real`; `with_mean` it also adds up the logits."""
    load, _ = conversions(dtype)
    load_bias, _ = conversions(bias_dtype)
    product, logits_tile = make_product(tiles, real), make_logits_tile(tiles, load, real)
    column_of = product.column_of
    a_shape, b_shape, acc_shape = product.a_shape, product.b_shape, product.acc_shape
    block_n, block_v, threads = tiles.block_n, tiles.block_v, tiles.threads
    thread_n, thread_v, threads_n, threads_v = tiles.thread_n, tiles.thread_v, tiles.threads_n, tiles.threads_v
    partial_shape, hit_shape = (threads_v, block_n), (threads_n, block_v)
    totals, column_weights = (block_n, block_v) if with_mean else (1, 1)
    alignment = ALIGNMENT
    minus_infinity, out_of_reach = real(-math.inf), real(1e38)
    slack = real(RELATIVE_SLACK)

    @kernel_of(tiles.threads, tiles.ctas)
    def lse_kernel(
        e: Any,  # (N, D)
        c: Any,  # (V, D)
        bias: Any,  # (V,)
        has_bias: Any,  # bool
        targets: Any,  # (N,) int64
        tokens: Any,  # (N,) int64, the first n_valid[0] count
        n_valid: Any,  # (1,) int64
        target_logit: Any,  # (N,)
        logit_scale: Any,  # (N,)
        has_scale: Any,  # bool
        softcap: Any,  # 0 for none
        class_weights: Any,  # (V,)
        has_class_weights: Any,  # bool
        first_tile: Any,  # vocabulary tiles
        tiles_per_split: Any,
        last_tile: Any,
        part_max: Any,  # (splits, N)
        part_sum: Any,  # (splits, N)
        part_total: Any,  # (splits, N) float64
        survivors: Any,  # (n_blocks, ceil(V / 8)) uint8
        record: Any,  # bool
        log_eps: Any,  # natural log
        lse_so_far: Any,  # (N,)
        has_lse: Any,  # bool
    ) -> None:
        """Grid (n_blocks, splits). part_max, part_sum (splits, N): each listed token's (max, sum of exp(z - max)).

        Over the vocabulary tiles [first_tile, last_tile). e (N, D), c (V, D), bias (V,); targets, target_logit (N,);
        tokens (N,) lists n_valid[0] tokens; lse_so_far (N,) what tiles before these have given, if `has_lse`. part_total
        (splits, N): the sums of class weight times logit, if the kernel was made `with_mean`.
        survivors (n_blocks, ceil(V / 8)): bytes of little-endian bits, written whole if `record`.
        """
        e_smem = cuda.shared.array(a_shape, real, alignment)
        c_smem = cuda.shared.array(b_shape, real, alignment)
        e_rows = cuda.shared.array(block_n, np.uint32)
        c_rows = cuda.shared.array(block_v, np.uint32)
        row_target = cuda.shared.array(block_n, np.int64)
        row_bound = cuda.shared.array(block_n, real)  # of the final log-sum-exp, from below
        row_max = cuda.shared.array(block_n, real)
        row_sum = cuda.shared.array(block_n, real)
        row_lost = cuda.shared.array(block_n, real)  # what rounding took from row_sum (Kahan)
        row_scale = cuda.shared.array(block_n, real)
        row_total = cuda.shared.array(totals, np.float64)
        column_weight = cuda.shared.array(column_weights, real)
        partial = cuda.shared.array(partial_shape, real)
        hits = cuda.shared.array(hit_shape, np.uint8)
        acc = cuda.local.array(acc_shape, real)
        x, y = cuda.threadIdx.x, cuda.threadIdx.y
        t = y * threads_v + x
        n0, V = cuda.blockIdx.x * block_n, c.shape[0]
        if n0 >= n_valid[0]:
            return
        for r in range(t, block_n, threads):
            row_max[r], row_sum[r], row_lost[r] = minus_infinity, real(0), real(0)
            token = tokens[min(n0 + r, n_valid[0] - 1)]
            e_rows[r], row_target[r], row_bound[r] = token, targets[token], target_logit[token]
            row_scale[r] = logit_scale[token] if has_scale else real(1)
            if with_mean:
                row_total[r] = 0
            if has_lse and lse_so_far[token] > row_bound[r]:
                row_bound[r] = lse_so_far[token]
            if n0 + r >= n_valid[0]:  # a row past the end repeats the last token, flags nothing and is not written
                row_target[r], row_bound[r] = -1, out_of_reach

        first = (first_tile + cuda.blockIdx.y * tiles_per_split) * block_v
        last = min(first + tiles_per_split * block_v, last_tile * block_v, V)
        for v0 in range(first, last, block_v):
            for r in range(t, block_v, threads):
                c_rows[r] = min(v0 + r, V - 1)
                if with_mean:
                    column_weight[r] = real(0)
                    if v0 + r < V:
                        column_weight[r] = class_weights[v0 + r] if has_class_weights else real(1)
            logits_tile(acc, e, e_rows, c, c_rows, e_smem, c_smem)

            # Products become logits; padding is masked last, so that no bias or cap can lift it.
            for j in range(thread_v):
                v = v0 + column_of(j)
                offset = real(0)
                if has_bias and v < V:
                    offset = real(load_bias(bias[v]))
                for i in range(thread_n):
                    scale = row_scale[y * thread_n + i]
                    acc[i, j] = finish_logit(acc[i, j], offset, scale, softcap) if v < V else minus_infinity

            # The tile's row maxima: each thread its own columns, then across the threads of a row.
            for i in range(thread_n):
                largest = minus_infinity
                for j in range(thread_v):
                    if acc[i, j] > largest:
                        largest = acc[i, j]
                partial[x, y * thread_n + i] = largest
            cuda.syncthreads()
            for r in range(t, block_n, threads):
                largest = row_max[r]
                for other in range(threads_v):
                    if partial[other, r] > largest:
                        largest = partial[other, r]
                rescale = real(0)
                if row_max[r] > minus_infinity:  # else there is nothing to rescale, and -inf - -inf is NaN
                    rescale = real(math.exp(row_max[r] - largest))
                row_max[r] = largest
                row_sum[r] *= rescale
                row_lost[r] *= rescale
            cuda.syncthreads()

            # Their sums of exponentials, likewise. NaN gets in here: it is in no maximum, but in every sum.
            for i in range(thread_n):
                shift = row_max[y * thread_n + i]
                if shift == minus_infinity:
                    shift = real(0)
                total = real(0)
                for j in range(thread_v):
                    total += real(math.exp(acc[i, j] - shift))
                partial[x, y * thread_n + i] = total
            cuda.syncthreads()
            for r in range(t, block_n, threads):
                total = -row_lost[r]
                for other in range(threads_v):
                    total += partial[other, r]
                new_sum = row_sum[r] + total
                row_lost[r] = (new_sum - row_sum[r]) - total
                row_sum[r] = new_sum
                if new_sum > real(0):
                    so_far = row_max[r] + real(math.log(new_sum))
                    if so_far > row_bound[r]:
                        row_bound[r] = so_far
            cuda.syncthreads()

            if with_mean:
                for i in range(thread_n):
                    total = real(0)
                    for j in range(thread_v):
                        weight = column_weight[column_of(j)]
                        if weight != 0:  # nor for the padding, which is -inf
                            total += acc[i, j] * weight
                    partial[x, y * thread_n + i] = total
                cuda.syncthreads()
                for r in range(t, block_n, threads):
                    for other in range(threads_v):
                        row_total[r] += partial[other, r]
                cuda.syncthreads()

            if record:
                for j in range(thread_v):
                    column = column_of(j)
                    hit = 0
                    for i in range(thread_n):
                        row = y * thread_n + i
                        threshold = row_bound[row] - slack * abs(row_bound[row]) + log_eps
                        # "not below" rather than "at least": NaN survives.
                        if not (acc[i, j] < threshold) or row_target[row] == v0 + column:
                            hit = 1
                    hits[y, column] = hit if v0 + column < V else 0
                cuda.syncthreads()
                for byte in range(t, block_v // 8, threads):
                    if v0 + 8 * byte < V:
                        bits = 0
                        for bit in range(8):
                            for other in range(threads_n):
                                bits |= hits[other, 8 * byte + bit] << bit
                        survivors[cuda.blockIdx.x, v0 // 8 + byte] = bits
            # logits_tile begins with a barrier: nobody overwrites what others still read.

        cuda.syncthreads()
        for r in range(t, block_n, threads):
            if n0 + r < n_valid[0]:
                part_max[cuda.blockIdx.y, n0 + r] = row_max[r]
                part_sum[cuda.blockIdx.y, n0 + r] = row_sum[r] - row_lost[r]
                if with_mean:
                    part_total[cuda.blockIdx.y, n0 + r] = row_total[r]

    return lse_kernel


@functools.cache
def make_finish_kernel(tiles: SimtTiles, real: Any, with_mean: bool) -> Any:
    """Merges the splits, and keeps everything in a block where a token is lost; `with_mean` also means of the logits."""
    block_n = tiles.block_n

    @cuda.jit
    def finish_kernel(
        part_max: Any,  # (splits, N)
        part_sum: Any,  # (splits, N)
        part_total: Any,  # (splits, N) float64
        tokens: Any,  # (N,) int64, the first n_valid[0] count
        n_valid: Any,  # (1,) int64
        target_logit: Any,  # (N,)
        lse: Any,  # (N,)
        mean_logit: Any,  # (N,)
        survivors: Any,  # (n_blocks, ceil(V / 8)) uint8
        record: Any,  # bool
        V: Any,  # vocabulary entries
    ) -> None:
        """Grid n_blocks, block_n threads. lse (N,) = log-sum-exp of each listed token. mean_logit (N,), `with_mean`.

        If a token of the block is lost (NaN lse or target logit), its gradient must be NaN in every column: all survive.
        """
        lost = cuda.shared.array(block_n, np.uint8)
        r, n_block = cuda.threadIdx.x, cuda.blockIdx.x
        position = n_block * block_n + r
        lost[r] = 0
        if position < n_valid[0]:
            largest, total = part_max[0, position], part_sum[0, position]
            for split in range(1, part_max.shape[0]):
                other = part_max[split, position]
                if other > largest:
                    if largest > real(-math.inf):
                        total *= real(math.exp(largest - other))
                    largest = other
                if other > real(-math.inf):
                    total += part_sum[split, position] * real(math.exp(other - largest))
                else:
                    total += part_sum[split, position]  # 0, or NaN from a row that is all NaN here
            token = tokens[position]
            result = total  # NaN stays NaN
            if total > real(0):
                result = largest + real(math.log(total))
            elif total == real(0):
                result = real(-math.inf)
            lse[token] = result
            if with_mean:
                of_splits = 0.0
                for split in range(part_total.shape[0]):
                    of_splits += part_total[split, position]
                mean_logit[token] = real(of_splits / V)
            if result != result or target_logit[token] != target_logit[token]:
                lost[r] = 1
        cuda.syncthreads()
        if record:
            any_lost = 0
            for other in range(block_n):
                any_lost |= lost[other]
            if any_lost:
                for byte in range(r, survivors.shape[1], block_n):
                    survivors[n_block, byte] = (1 << min(8, V - 8 * byte)) - 1

    return finish_kernel


def forward(p: Problem, tiles: SimtTiles, record_survivors: bool) -> Statistics:
    """Log-sum-exp, target logit and survivors of each token, and its mean logit where it is asked for."""
    xp: Any = p.xp
    real: Any = p.compute_dtype.type
    tokens, n_valid = list_tokens(p)
    if p.targets is None:
        targets, target_logit = tokens, xp.full(p.N, -math.inf, p.compute_dtype)
    else:
        targets, target_logit = p.targets, indexed_dot(p, tokens, n_valid)
    n_blocks, v_tiles = ceil_div(p.N, tiles.block_n), ceil_div(p.V, tiles.block_v)
    phases = [(0, v_tiles)]
    if record_survivors and v_tiles >= 2 * _HEAD:
        phases = [(0, v_tiles // _HEAD), (v_tiles // _HEAD, v_tiles)]
    splits = [count_splits(n_blocks, last - first) for first, last in phases]
    part_max, part_sum = (xp.empty((sum(splits), p.N), p.compute_dtype) for _ in range(2))
    survivors = xp.zeros((n_blocks, ceil_div(p.V, 8)) if record_survivors else (1, 1), np.uint8)
    lse = xp.zeros(p.N, p.compute_dtype)
    bias = xp.zeros(1, p.dtype) if p.bias is None else p.bias
    logit_scale, of_class = (lse if x is None else x for x in (p.logit_scale, p.class_weights))
    with_mean = p.options.smooths_capped
    part_total = xp.empty(part_sum.shape if with_mean else (1, 1), np.float64)
    mean_logit = xp.zeros(p.N, p.compute_dtype) if with_mean else lse
    done = 0
    for phase, ((first, last), more) in enumerate(zip(phases, splits, strict=True)):
        launch(
            make_lse_kernel(tiles, p.dtype, np.dtype(bias.dtype), real, with_mean),
            (n_blocks, more),
            (tiles.threads_v, tiles.threads_n),
            *(p.e, p.c, bias, p.bias is not None, targets, tokens, n_valid, target_logit, logit_scale),
            *(p.logit_scale is not None, real(p.options.softcap or 0), of_class, p.class_weights is not None),
            *(first, ceil_div(last - first, more), last),
            *(part[done : done + more] for part in (part_max, part_sum, part_total)),
            *(survivors, record_survivors, real(log_threshold(p.options.filter_eps)), lse, phase > 0),
        )
        done += more
        launch(
            make_finish_kernel(tiles, real, with_mean),
            (n_blocks,),
            (tiles.block_n,),
            *(part_max[:done], part_sum[:done], part_total[:done], tokens, n_valid, target_logit, lse, mean_logit, survivors),
            *(record_survivors and last == v_tiles, p.V),
        )
    return Statistics(
        tokens=tokens,
        n_valid=n_valid.reshape(()),
        lse=lse,
        target_logit=None if p.targets is None else target_logit,
        survivors=survivors if record_survivors else None,
        survivor_block=tiles.block_n,
        mean_logit=mean_logit if with_mean else None,
    )


def count_splits(n_blocks: int, v_tiles: int) -> int:
    """How many CTAs share a block of tokens: enough for about four CTAs on each multiprocessor, none without tiles."""
    wanted = max(1, min(v_tiles, ceil_div(4 * multiprocessors(), max(1, n_blocks))))
    return ceil_div(v_tiles, ceil_div(v_tiles, wanted))
