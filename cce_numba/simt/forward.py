"""The forward: tiles of logits live in registers, and folds make of them what is kept for each token (paper section 4.2).

A CTA owns `block_n` tokens and a range of vocabulary tiles. Where the blocks of tokens alone would not fill the GPU, several
CTAs share a block; each of them sees a part of the vocabulary, a split. `lse_kernel` runs the folds over the tiles,
`finish_kernel` merges what the splits have found. What a fold is, and which there are, is in `folds/`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numba import cuda

from cce_numba import gpu
from cce_numba.arguments import Problem
from cce_numba.backend import Statistics
from cce_numba.gpu import SIMULATED
from cce_numba.integers import ceil_div
from cce_numba.launch.array_kernel import ArrayKernel, argument
from cce_numba.launch.kernel import kernel_factory
from cce_numba.parallel.bounds import phase_of_exchange
from cce_numba.simt import folds as folds_
from cce_numba.simt.draws import draw_seed
from cce_numba.simt.folds.composed import compose
from cce_numba.simt.folds.fold import Block, Fold, Given, Place, Tile
from cce_numba.simt.indexed_dot import indexed_dot
from cce_numba.simt.logits import make_products_tile, make_terms
from cce_numba.simt.numbers import conversions, real_of
from cce_numba.simt.product import make_product
from cce_numba.simt.records import LogitTerms, bias_dtype_of, by_target
from cce_numba.simt.staging import ALIGNMENT, Operand
from cce_numba.simt.tiles import SimtTiles
from cce_numba.simt.tokens import list_tokens

# Where survivors are recorded, this part of the vocabulary goes first, and its log-sum-exp gives all CTAs a bound for the rest.
# Without that each would know only what it has seen itself. Tokenizers give the frequent entries the first numbers. On real
# text (V = 49152, eps = 2^-16, 32 splits) it changes the flagged columns from 85 % to 40 %, where 32 % survive in truth.
_HEAD = 8
# CTAs that share a block of tokens where a token's numbers must not depend on its batch. They are few, since what each of them
# finds of a token takes memory (of the best entries most), and enough for a few tokens on a small GPU.
_INVARIANT_SPLITS = 16


class Splits(NamedTuple):
    """The vocabulary tiles [first_tile, last_tile), in splits of tiles_per_split tiles."""

    first_tile: Any  # int
    last_tile: Any  # int
    tiles_per_split: Any  # int
    first_split: Any  # int: the number of the first of these splits among all


@kernel_factory
def make_lse_kernel(tiles: SimtTiles, dtype: np.dtype, bias_dtype: np.dtype, folds: tuple[Fold, ...]) -> ArrayKernel:
    """The kernel for `e` and `c` of `dtype` that runs these folds."""
    real = real_of(dtype)
    load, _ = conversions(dtype)
    product, products_tile = make_product(tiles, real), make_products_tile(tiles, load, real)
    bias_of, scale_of, logit_of = make_terms(bias_dtype, real)
    column_of = product.column_of
    composed = compose(folds, tiles, np.dtype(real))
    begin, step, write = composed.begin, composed.step, composed.write
    e_shape, c_shape, acc_shape = product.a_shape, product.b_shape, product.acc_shape
    block_n, block_v, threads, threads_v = tiles.block_n, tiles.block_v, tiles.threads, tiles.threads_v
    thread_n, thread_v = tiles.thread_n, tiles.thread_v
    partial_shape, alignment, minus_infinity = (threads_v, block_n), ALIGNMENT, real(-math.inf)

    def lse_kernel(
        e: Any,  # (N, D)
        c: Any,  # (V, D)
        terms: Any,  # LogitTerms
        tokens: Any,  # Tokens
        splits: Any,  # Splits
        arrays: Any,  # a record for each fold
        parts: Any,  # see folds.composed: what each split finds
    ) -> None:
        """Grid (n_blocks, splits). Runs the folds over the CTA's tiles, and writes what they find of its tokens to parts."""
        e_smem = cuda.shared.array(e_shape, real, alignment)
        c_smem = cuda.shared.array(c_shape, real, alignment)
        e_rows = cuda.shared.array(block_n, np.uint32)
        c_rows = cuda.shared.array(block_v, np.uint32)
        row_scale = cuda.shared.array(block_n, real)
        partial = cuda.shared.array(partial_shape, real)
        acc = cuda.local.array(acc_shape, real)
        y = cuda.threadIdx.y
        t = y * threads_v + cuda.threadIdx.x
        n_block, n_valid, V = cuda.blockIdx.x, tokens.n_valid[0], c.shape[0]
        n0 = n_block * block_n
        if n0 >= n_valid:
            return
        for r in range(t, block_n, threads):
            token = tokens.listed[min(n0 + r, n_valid - 1)]  # a row past the end repeats the last token
            e_rows[r], row_scale[r] = token, scale_of(terms, token)
        split = splits.first_split + cuda.blockIdx.y
        states = begin(arrays, Block(tokens, n0, splits.first_tile > 0, split))

        first = (splits.first_tile + cuda.blockIdx.y * splits.tiles_per_split) * block_v
        last = min(first + splits.tiles_per_split * block_v, splits.last_tile * block_v, V)
        for v0 in range(first, last, block_v):
            for r in range(t, block_v, threads):
                c_rows[r] = min(v0 + r, V - 1)
            products_tile(acc, Operand(e, e_rows, e_smem), Operand(c, c_rows, c_smem))

            # Products become logits. Padding is masked last, so that no bias or cap can lift it.
            for j in range(thread_v):
                v = v0 + column_of(j)
                bias = real(0)
                if v < V:
                    bias = bias_of(terms, v)
                for i in range(thread_n):
                    scale = row_scale[y * thread_n + i]
                    acc[i, j] = logit_of(acc[i, j], bias, scale, terms) if v < V else minus_infinity

            step(states, arrays, Tile(acc, n_block, v0, V, partial))

        for r in range(t, block_n, threads):
            if n0 + r < n_valid:
                write(states, r, parts, split, n0 + r)

    return ArrayKernel(lse_kernel, block=(tiles.threads_v, tiles.threads_n), ctas=tiles.ctas)


@kernel_factory
def make_finish_kernel(tiles: SimtTiles, real: np.dtype, folds: tuple[Fold, ...]) -> ArrayKernel:
    """The kernel that merges the splits of these folds, for logits of dtype `real`."""
    composed = compose(folds, tiles, real)
    read, merge, store = composed.read, composed.merge, composed.store
    block_n = tiles.block_n

    def finish_kernel(
        tokens: Any,  # Tokens
        arrays: Any,  # a record for each fold
        parts: Any,  # see folds.composed: what each split has found
        n_splits: Any,  # int
        V: Any,  # vocabulary entries
    ) -> None:
        """Grid n_blocks, a thread for each token of a block. Merges the parts of its token, and stores the folds' results."""
        r, n_block, n_valid = cuda.threadIdx.x, cuda.blockIdx.x, tokens.n_valid[0]
        position = n_block * block_n + r
        if n_block * block_n >= n_valid:
            return
        own = min(position, n_valid - 1)
        rows = read(parts, 0, own)
        for split in range(1, n_splits):
            rows = merge(rows, read(parts, split, own))
        store(rows, arrays, Place(tokens.listed[own], position < n_valid, r, n_block, V, own, n_splits))

    return ArrayKernel(finish_kernel, block=block_n)


def forward(p: Problem, tiles: SimtTiles, record_survivors: bool) -> Statistics:
    """What the folds of a problem find."""
    xp: Any = p.xp
    tokens, terms = list_tokens(p), argument(LogitTerms.of(p))
    # Survivors want a bound of the log-sum-exp before the first tile.
    bound = indexed_dot(p, tokens, terms) if record_survivors and p.targets is not None else None
    seed = draw_seed(p, tokens) if record_survivors and p.options.is_unbiased else None
    n_blocks, v_tiles = ceil_div(p.N, tiles.block_n), ceil_div(p.V, tiles.block_v)
    phases = [(0, v_tiles)]
    # An invariant token does not know either whether a backward is to come.
    if (record_survivors or p.options.batch_invariant) and v_tiles >= 2 * _HEAD:
        phases = [(0, v_tiles // _HEAD), (v_tiles // _HEAD, v_tiles)]
    splits = [count_splits(n_blocks, last - first, p.options.batch_invariant) for first, last in phases]

    folds = folds_.of_problem(p, record_survivors)
    given = Given(p, tiles, tokens, by_target(p.targets), bound, seed, sum(splits))
    records = [fold.arrays(given) for fold in folds]
    shape = sum(splits), p.N
    parts = [tuple(xp.empty(shape, dtype) for dtype in fold.row_dtypes(p.compute_dtype)) for fold in folds]
    listed, of_folds, found = argument(tokens), argument(tuple(records)), argument(tuple(parts))
    lse_kernel = make_lse_kernel(tiles, p.dtype, bias_dtype_of(p), folds)
    finish_kernel = make_finish_kernel(tiles, p.compute_dtype, folds)
    done, bounds = 0, p.bounds
    exchange = phase_of_exchange([first for first, _ in phases], v_tiles)
    for phase, ((first, last), more) in enumerate(zip(phases, splits, strict=True)):
        if phase == exchange and bounds is not None and bound is not None:
            bound[...] = bounds.of_all(bound, records[0].lse if phase else None)
        these = Splits(first, last, ceil_div(last - first, more), first_split=done)
        lse_kernel.launch((n_blocks, more), p.e, p.c, terms, listed, these, of_folds, found)
        done += more
        finish_kernel.launch(n_blocks, listed, of_folds, found, done, p.V)

    results = {name: array for fold, record in zip(folds, records, strict=True) for name, array in fold.results(record).items()}
    return Statistics(
        tokens=tokens.listed,
        n_valid=tokens.n_valid.reshape(()),
        lse=results.pop("lse"),
        max_logit=results.pop("max_logit"),
        log_sum=results.pop("log_sum"),
        target_logit=results.pop("target_logit", None),
        survivors=results.pop("survivors", None),
        survivor_block=tiles.survivor_block,
        mean_logit=results.pop("mean_logit", None),
        draw_seed=None if seed is None else seed.reshape(()),
        entropy=results.pop("entropy", None),
        sum_squares=results.pop("sum_squares", None),
        top_logits=results.pop("top_logits", None),
        top_ids=results.pop("top_ids", None),
        folded=results,
    )


def bytes_of_row(p: Problem) -> int:
    """What each split leaves of a token, in bytes, until it is merged."""
    dtypes = [dtype for fold in folds_.of_problem(p, False) for dtype in fold.row_dtypes(p.compute_dtype)]
    of_best = p.options.top_k * (p.compute_dtype.itemsize + 8) + 8 if p.options.top_k else 0
    return sum(dtype.itemsize for dtype in dtypes) + of_best


def count_splits(n_blocks: int, v_tiles: int, invariant: bool = False) -> int:
    """How many CTAs share a block of tokens: enough for about four CTAs on each multiprocessor, none without tiles.

    `invariant`: by the tiles alone, so that the tokens' numbers depend neither on the batch nor on the GPU's size.
    """
    if invariant:
        share = _INVARIANT_SPLITS
    else:
        multiprocessors = 1 if SIMULATED else gpu.current().multiprocessors
        share = ceil_div(4 * multiprocessors, max(1, n_blocks))
    wanted = max(1, min(v_tiles, share))
    return ceil_div(v_tiles, ceil_div(v_tiles, wanted))
