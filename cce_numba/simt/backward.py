"""The backward: for each chunk of the vocabulary, three products with one owner per output tile, hence no atomics.

    columns       of each block of tokens that survive in the chunk, as a list
    G             the surviving logits again, and from them softmax_weight * softmax - target_weight * onehot
    dC = G.T @ E  of the chunk, complete: all tokens, rounded once, written once
    dE += G @ C   accumulated over chunks, rounded with the last

Gradients that are added to an array begin with what is in it, or meet it in the sum that is rounded.

G is stored column by column, each at its place in the chunk, so both products can pick from it: what did not survive is
neither written nor read.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cce_numba.arguments import Problem
from cce_numba.backend import Gradients, Statistics, Weights
from cce_numba.gpu import SIMULATED
from cce_numba.integers import ceil_div
from cce_numba.simt.columns import LIST_THREADS, make_list_columns_kernel
from cce_numba.simt.gradient_of_logits import make_gradient_of_logits_kernel
from cce_numba.simt.gradients import make_d_bias_kernel, make_d_c_kernel, make_d_e_kernel
from cce_numba.simt.launch import argument, launch
from cce_numba.simt.tiles import SimtTiles

WORKSPACE_BYTES = 64 * 2**20  # for G
_MAX_CHUNK = 2**21  # a grid has at most 65535 tiles in its second dimension


def chunk_of(p: Problem, tiles: SimtTiles) -> int:
    """Vocabulary entries whose G fits in the workspace; at least one tile, whatever N is."""
    tile = max(tiles.block_n, tiles.block_v)
    fitting = min(WORKSPACE_BYTES // (p.compute_dtype.itemsize * max(1, p.N)), _MAX_CHUNK) // tile * tile
    return min(max(tile, 4 * tile if SIMULATED else fitting), ceil_div(p.V, tile) * tile)


def backward(
    p: Problem,
    tiles: SimtTiles,
    statistics: Statistics,
    weights: Weights,
    into: Gradients,
    adds: bool,
) -> None:
    """Writes the gradients `into` arrays, or adds to what is in there; see `backend.Backend`."""
    xp: Any = p.xp
    real: Any = p.compute_dtype.type
    d_e, d_c, d_bias = into.e, into.c, into.bias
    n_blocks, chunk = ceil_div(p.N, tiles.block_n), chunk_of(p, tiles)
    keep_all_e, keep_all_c = p.options.filter_eps_e is None, p.options.filter_eps_c is None
    exact_g = (d_e is not None and keep_all_e) or ((d_c is not None or d_bias is not None) and keep_all_c)
    # A gradient of the compute dtype is its own sum; one that must be rounded has a sum beside it, if there are chunks.
    sums_itself = d_e is None or d_e.dtype == p.compute_dtype
    d_e_sum = d_e if sums_itself else xp.empty((p.N, p.D) if chunk < p.V else (1, 1), p.compute_dtype)
    d_e_rounded = xp.empty((1, 1), p.compute_dtype) if sums_itself else d_e

    # Kernels take these again and again.
    e, c, targets, target_logit, lse = map(argument, (p.e, p.c, p.targets, statistics.target_logit, statistics.lse))
    tokens, n_valid = argument(statistics.tokens), argument(statistics.n_valid.reshape(1))
    survivors = argument(xp.zeros((1, 1), np.uint8) if statistics.survivors is None else statistics.survivors)
    g = argument(xp.empty((chunk, p.N), p.compute_dtype))
    softmax_weight, target_weight, uniform_weight = argument(weights.softmax), argument(weights.target), weights.uniform
    # Most kernels ask the weights only whether a token takes part, and two can answer for three.
    marks = softmax_weight, target_weight
    if uniform_weight is not None:
        marks = argument(xp.where(uniform_weight != 0, uniform_weight, weights.softmax)), target_weight
    logit_scale, of_class, of_uniform = (
        lse if x is None else argument(x) for x in (p.logit_scale, p.class_weights, uniform_weight)
    )
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
                (LIST_THREADS,),
                *(survivors, keep_all, tokens, n_valid, *marks, v0, v1, columns, count),
            )
        columns, count = lists[0]
        launch(
            make_gradient_of_logits_kernel(tiles, p.dtype, bias_dtype, real, uniform_weight is not None),
            (n_blocks, ceil_div(v1 - v0, tiles.block_v)),
            block,
            *(e, c, bias, p.bias is not None, targets, tokens, n_valid, target_logit, lse),
            *(logit_scale, p.logit_scale is not None, real(p.options.softcap or 0), of_class, p.class_weights is not None),
            *(softmax_weight, target_weight, of_uniform, v0, columns, count, g),
        )
        if d_e is not None:
            launch(
                make_d_e_kernel(tiles, p.dtype, np.dtype(d_e.dtype), real),
                (n_blocks, D_tiles),
                block,
                *(g, c, v0, *lists[-1], tokens, n_valid, *marks),
                *(v0 == 0 and not (adds and sums_itself), v1 == p.V and not sums_itself, adds),
                *(d_e_sum, d_e_rounded),
            )
        if d_c is not None:
            launch(
                make_d_c_kernel(tiles, p.dtype, np.dtype(d_c.dtype), real),
                (ceil_div(v1 - v0, tiles.block_n), D_tiles),
                block,
                *(g, e, v0, v1, survivors, keep_all_c, count, tokens, n_valid, *marks, adds, d_c),
            )
        if d_bias is not None:
            launch(
                make_d_bias_kernel(tiles, np.dtype(d_bias.dtype), real),
                (ceil_div(v1 - v0, tiles.block_n),),
                (tiles.block_n,),
                *(g, v0, v1, survivors, keep_all_c, count, n_valid, adds, d_bias),
            )
