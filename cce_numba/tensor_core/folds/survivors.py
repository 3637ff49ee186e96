"""Survivor bits: which vocabulary entries the backward must look at for a block of tokens (see `cce_numba.survivors`).

A bit is set if the probability may reach the threshold, judged by a lower bound of the row's final log-sum-exp: the largest of
the target's logit, what earlier parts of the vocabulary have given, and what this worker has seen so far. The unbiased filter
has a threshold for each column of each block of tokens: eps times the column's draw.
"""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from cce_numba import folds
from cce_numba.launch.record import Record
from cce_numba.ptx import arithmetic, control, memory
from cce_numba.survivors import SURVIVOR_BLOCK, make_threshold
from cce_numba.tensor_core.draws import draw
from cce_numba.tensor_core.exponentials import LN2, log2
from cce_numba.tensor_core.folds.chain import NOTHING_TO_TELL, Fold
from cce_numba.tensor_core.folds.columns import kept_number, make_keep_columns
from cce_numba.tensor_core.fragment import collect_bits, collect_bits_by_column
from cce_numba.tensor_core.records import F32
from cce_numba.tensor_core.tokens import token_at

maximum = arithmetic.maximum
threshold_of = cuda.jit(device=True, forceinline=True)(make_threshold(np.float32))
# A bound whose threshold is NaN, which no logit reaches: a row that is nobody's flags nothing, whatever stands in it.
OUT_OF_REACH = np.float32(math.inf)
ALL_BITS = np.uint32(0xFFFFFFFF)


class Bounds(Record):
    """Of a pair of rows: lower bounds of their final log-sum-exp, as known before the first tile."""

    bound_0 = F32
    bound_1 = F32


def may_survive(z: Any, threshold: Any) -> Any:
    """Whether the probability may reach eps."""
    return z >= threshold


def may_survive_by_chance(z: Any, threshold: Any, log_u: Any) -> Any:
    """Whether the probability may reach eps * u."""
    return z >= threshold + log_u


@cuda.jit(device=True, forceinline=True)
def log_draw(v: Any, tile: Any) -> Any:
    """The natural logarithm of the draw of an entry for the tile's block of tokens."""
    return LN2 * log2(draw(tile.survivors.first_block + tile.block, v, tile.survivors.seed[0]))


def make(n: int) -> SimpleNamespace:
    """For the filter that drops; see `tensor_core.folds`."""
    return _make(n, by_chance=False)


def make_by_chance(n: int) -> SimpleNamespace:
    """For the unbiased filter; see `tensor_core.folds`."""
    return _make(n, by_chance=True)


@functools.cache
def _make(n: int, by_chance: bool) -> SimpleNamespace:
    survivor_words, words = collect_bits(n, may_survive), n // 32
    words_by_chance = collect_bits_by_column(n, kept_number, may_survive_by_chance, types.uint32)
    keep_columns = make_keep_columns(n, log_draw)

    @cuda.jit(device=True, forceinline=True)
    def bound_of(position: Any, rows: Any, found: Any) -> Any:
        """The lower bound of the log-sum-exp of the token at a position, a float32; out of reach past the listed tokens."""
        if position >= rows.n_listed:
            return OUT_OF_REACH
        token = token_at(rows.tokens, position)
        bound = found.bound[token]
        if rows.has_earlier:
            bound = maximum(bound, found.results[token])
        return bound

    @cuda.jit(device=True, forceinline=True)
    def begin(rows: Any, found: Any, at: Any) -> Any:
        """Bounds of the pair's log-sum-exp from below: the target's logit, and what earlier parts of the vocabulary gave."""
        return Bounds(bound_of(rows.position_0, rows, found), bound_of(rows.position_1, rows, found))

    @cuda.jit(device=True, forceinline=True)
    def set_bits(of_lane: Any, tile: Any, coarse_words: Any) -> None:
        """By a warp: sets the bits of the tile's columns that a lane of it flags."""
        lane, mine = np.int32(tile.thread & 31), np.uint32(0)
        for w in range(words):
            bits = control.or_of_warp(of_lane[w] << np.uint32(2 * (lane & 3)))
            if lane == w:
                mine = np.uint32(bits)
        columns: Any = np.int32(tile.V - tile.v_tile * n - 32 * lane)
        if columns < 32:
            mine = np.uint32(mine & ((np.uint32(1) << np.uint32(max(columns, 0))) - np.uint32(1)))
        if lane < words and mine != 0:
            # `opaque` hides the block number from LLVM, which would otherwise hoist this address out of the loop and spill it.
            block = np.int64(arithmetic.opaque_i32(np.int32(tile.block)))
            word = block * tile.survivors.pitch_words + tile.v_tile * words + lane + coarse_words
            memory.or_global_u32(tile.survivors.bits + np.uint64(4 * word), mine)

    @cuda.jit(device=True, forceinline=True)
    def step(state: Any, z: Any, tile: Any, lse: Any, found: Any, at: Any) -> Any:
        """Flags the columns of half a tile: in the plane of the filter, and in that of dC if it has a threshold of its own."""
        threshold_0 = threshold_of(maximum(state.bound_0, lse[0]), tile.survivors.log_eps)
        threshold_1 = threshold_of(maximum(state.bound_1, lse[1]), tile.survivors.log_eps)
        if by_chance:
            keep_columns(tile)
            own_column, columns_smem = np.int32(2 * (tile.thread & 3)), arithmetic.opaque_u32(tile.columns_smem)
            set_bits(words_by_chance(z, own_column, threshold_0, threshold_1, columns_smem), tile, np.int64(0))
            return state
        if tile.survivors.coarse_words != 0:
            coarser = tile.survivors.log_coarser
            set_bits(survivor_words(z, threshold_0 + coarser, threshold_1 + coarser), tile, tile.survivors.coarse_words)
        set_bits(survivor_words(z, threshold_0, threshold_1), tile, np.int64(0))
        return state

    @cuda.jit(device=True, forceinline=True)
    def store(numbers: Any, lse: Any, row: Any, found: Any, survivors: Any, at: Any) -> None:
        """The gradient of a token that is lost is NaN in every column, so all columns of its block must survive."""
        if survivors.pitch_words == 0:
            return
        target_logit = found.bound[row.token]
        if lse != lse or target_logit != target_logit:
            first_word = row.position // SURVIVOR_BLOCK * survivors.pitch_words
            for word in range(row.lane, (row.V + 31) // 32, 32):
                all_of_word = ALL_BITS >> np.uint32(max(0, 32 * word + 32 - row.V))
                at_word = survivors.bits + np.uint64(4 * (first_word + word))
                memory.store_global_u32(at_word, all_of_word)
                memory.store_global_u32(at_word + np.uint64(4 * survivors.coarse_words), all_of_word)

    return SimpleNamespace(begin=begin, step=step, store=store, **NOTHING_TO_TELL)


SURVIVORS = Fold(folds.SURVIVORS, make, numbers=0)
SURVIVORS_BY_CHANCE = Fold(folds.SURVIVORS, make_by_chance, numbers=0)
