"""Survivors: the vocabulary entries whose logits the backward computes again; one bit for each block of tokens and entry.

An entry is dropped in a block if its probability is known to be below eps for every token of the block. It is known for a token
if the logit is below bound + log(eps), where the bound is no larger than the token's log-sum-exp: the larger of the target's
logit and the log-sum-exp of what was seen so far. A target survives in any case, and so does NaN. The unbiased filter has a
threshold eps * u for each column instead, with draws u in (0, 1). `cce_numba/survivors.py` has the rules.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numba import cuda

from cce_numba import folds
from cce_numba.integers import ceil_div
from cce_numba.simt.draws import draw
from cce_numba.simt.folds.fold import Functions, Given
from cce_numba.simt.folds.max_sum import make_log_sum_exp
from cce_numba.simt.product import make_product
from cce_numba.simt.tiles import SimtTiles
from cce_numba.survivors import log_threshold, make_threshold

_OUT_OF_REACH = 1e38  # a bound whose threshold no logit reaches


class State(NamedTuple):
    """Of the rows of a block, in shared memory; `hits` is for use within a step."""

    token: Any  # (block_n,) int64; -1 for rows beyond the last token
    bound: Any  # (block_n,) real: of the log-sum-exp, from below
    hits: Any  # (threads_n, block_v) uint8: whether a column survives by the rows of these threads


class Arrays(NamedTuple):
    """In global memory."""

    targets: Any  # (N, K) int64
    padding: Any  # int: a target that is this number is none
    target_logit: Any  # (N,) real: of several targets the largest
    log_eps: Any  # real: natural log of the threshold, with some slack
    draw_seed: Any  # (1,) int64: of the unbiased filter
    bits: Any  # (n_blocks, ceil(V / 8)) uint8, little-endian over the vocabulary: the result


@dataclass(frozen=True)
class Survivors:
    """The fold. A row has nothing to merge: different splits write different bytes of the bits.

    Attributes:
        unbiased: whether each column has a threshold of its own, by chance.
    """

    unbiased: bool = False
    name: ClassVar[str] = folds.SURVIVORS
    Row: ClassVar[Any] = None

    def row_dtypes(self, real: np.dtype) -> tuple[np.dtype, ...]:
        """See `fold.Fold`."""
        return ()

    def arrays(self, given: Given) -> Arrays:
        """See `fold.Fold`."""
        p = given.problem
        log_eps = p.compute_dtype.type(log_threshold(p.options.filter_eps))
        bits = p.xp.zeros((ceil_div(p.N, given.tiles.survivor_block), ceil_div(p.V, 8)), np.uint8)
        any_array = given.tokens.n_valid  # which nobody reads
        seed = given.draw_seed if self.unbiased else any_array
        return Arrays(given.targets, p.options.ignore_index, given.bound, log_eps, seed, bits)

    def results(self, arrays: Arrays) -> dict[str, Any]:
        """See `fold.Fold`."""
        return {"survivors": arrays.bits}

    def functions(self, tiles: SimtTiles, real: np.dtype) -> Functions:
        """See `fold.Fold`."""
        return _functions(tiles, real.type, self.unbiased)


def _functions(tiles: SimtTiles, real: Any, unbiased: bool) -> Functions:
    block_n, block_v, threads = tiles.block_n, tiles.block_v, tiles.threads
    threads_n, threads_v, thread_n, thread_v = tiles.threads_n, tiles.threads_v, tiles.thread_n, tiles.thread_v
    hits_shape = (threads_n, block_v)
    column_of, log_sum_exp = make_product(tiles, real).column_of, make_log_sum_exp(real)
    zero, out_of_reach = real(0), real(_OUT_OF_REACH)
    threshold_of = cuda.jit(device=True)(make_threshold(real))

    @cuda.jit(device=True)
    def begin(arrays: Any, first_arrays: Any, block: Any) -> Any:
        """The numbers of the tokens and bounds of the block's rows; a row beyond the last token can flag nothing."""
        tokens = cuda.shared.array(block_n, np.int64)
        bound = cuda.shared.array(block_n, real)
        hits = cuda.shared.array(hits_shape, np.uint8)
        for r in range(cuda.threadIdx.y * threads_v + cuda.threadIdx.x, block_n, threads):
            tokens[r], bound[r] = -1, out_of_reach
            if block.n0 + r < block.tokens.n_valid[0]:
                token = block.tokens.listed[block.n0 + r]
                tokens[r], bound[r] = token, arrays.target_logit[token]
                if block.continues and first_arrays.lse[token] > bound[r]:
                    bound[r] = first_arrays.lse[token]
        return State(tokens, bound, hits)

    @cuda.jit(device=True)
    def step(state: Any, first_state: Any, arrays: Any, tile: Any) -> None:
        """Sets the bits of a tile of (block_n, block_v) logits, with the rows' bounds as far as they are known."""
        x, y = cuda.threadIdx.x, cuda.threadIdx.y
        t = y * threads_v + x
        for r in range(t, block_n, threads):
            if first_state.sum[r] > zero:
                so_far = log_sum_exp(first_state.largest[r], first_state.sum[r])
                if so_far > state.bound[r]:
                    state.bound[r] = so_far
        cuda.syncthreads()

        # Each thread its own rows, of each of its columns; then across the threads of a column, eight columns a byte.
        for j in range(thread_v):
            column = column_of(j)
            log_eps = arrays.log_eps
            if unbiased:
                log_eps += real(math.log(draw(tile.n_block, tile.v0 + column, arrays.draw_seed[0])))
            hit = 0
            for i in range(thread_n):
                row = y * thread_n + i
                threshold = threshold_of(state.bound[row], log_eps)
                # "not below" rather than "at least": NaN survives.
                if not (tile.logits[i, j] < threshold):
                    hit = 1
            state.hits[y, column] = hit if tile.v0 + column < tile.V else 0
        cuda.syncthreads()
        for r in range(t, block_n, threads):
            if state.token[r] >= 0:
                for k in range(arrays.targets.shape[1]):
                    target = arrays.targets[state.token[r], k]
                    if target != arrays.padding and target >= tile.v0 and target < min(tile.v0 + block_v, tile.V):
                        state.hits[0, target - tile.v0] = 1
        cuda.syncthreads()
        for byte in range(t, block_v // 8, threads):
            if tile.v0 + 8 * byte < tile.V:
                bits = 0
                for bit in range(8):
                    for other in range(threads_n):
                        bits |= state.hits[other, 8 * byte + bit] << bit
                arrays.bits[tile.n_block, tile.v0 // 8 + byte] = bits
        cuda.syncthreads()

    @cuda.jit(device=True)
    def row(state: Any, r: Any) -> Any:
        """Nothing: there is nothing to merge."""
        return ()

    @cuda.jit(device=True)
    def merge(row: Any, later: Any) -> Any:
        """Nothing: there is nothing to merge."""
        return ()

    @cuda.jit(device=True)
    def store(row: Any, first_row: Any, arrays: Any, place: Any) -> None:
        """If a token is lost (its log-sum-exp or target logit is NaN), its gradient is NaN in every column: all survive."""
        lost = cuda.shared.array(block_n, np.uint8)
        lse, target_logit = log_sum_exp(first_row.largest, first_row.sum), arrays.target_logit[place.token]
        lost[place.r] = 0
        if place.exists and (lse != lse or target_logit != target_logit):
            lost[place.r] = 1
        cuda.syncthreads()
        any_lost = 0
        for other in range(block_n):
            any_lost |= lost[other]
        if any_lost:
            for byte in range(place.r, arrays.bits.shape[1], block_n):
                arrays.bits[place.n_block, byte] = (1 << min(8, place.V - 8 * byte)) - 1

    return Functions(begin, step, row, merge, store)
