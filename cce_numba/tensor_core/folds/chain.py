"""One fold made of several, which see each tile in turn."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
from numba import cuda

from cce_numba.launch.record import Record
from cce_numba.tensor_core.records import F32, I32, I64, U32, U64, Survivors


@dataclass(frozen=True)
class Fold:
    """A fold, of which `make(n)` gives the device functions for tiles of n columns.

    Attributes:
        name: its name in `cce_numba.folds`.
        make: see `tensor_core.folds`.
        numbers: how many float32 of a row workers tell each other.
        results: names of what it stores for each token, float32 each.
        alone: it needs no log-sum-exp, so it need not follow `max_sum`.
    """

    name: str
    make: Callable[[int], SimpleNamespace]
    numbers: int = 1
    results: tuple[str, ...] = ()
    alone: bool = False


class RowPair(Record):
    """Two rows of a lane, and how their states begin."""

    position_0 = I32  # of the rows' tokens in the batch
    position_1 = I32
    tokens = U64  # address of the batch's tokens, int32
    n_listed = I32  # tokens that the batch has: positions from there on are nobody's
    row = I32  # of position_0 in the block of 128
    rows_smem = U32  # shared address of an int32 for each row of the block, of this consumer's own
    V = I32
    has_earlier = I32  # whether results of earlier parts of the vocabulary are there
    resumes = I32  # whether this worker's state goes on from them, which only one of those that share the rows may do


class Tile(Record):
    """Where half a tile of logits is from, and who folds it.

    A warp folds 16 rows, from 64 * half + 16 * (thread // 32) on. Where a warp has more rows of a half, it folds each 16 of
    them in the place of another warp: `thread` is then not the thread's number.
    """

    v_tile = I32  # the tile's number in the vocabulary
    V = I32
    block = I32  # of tokens, in the batch: a row of survivor bits
    half = I32  # 0 for the upper 64 rows, 1 for the lower
    consumer = I32  # the warpgroup
    thread = I32  # of the warpgroup, 0 to 127
    tokens = U64  # address of the batch's tokens, int32
    rows_smem = U32  # shared address of an int32 for each row of the block, of this consumer's own
    columns_smem = U32  # shared address of a float32 for each column of the tile, of this consumer's own
    class_weights = U64  # address of (V,) float32, or 0
    survivors = Survivors
    keepers = I32  # threads that share columns_smem: the 128 of a consumer, or the 32 of a warp (`columns`)


class Row(Record):
    """A listed token, as a warp merges it."""

    token = I32  # row of e
    position = I64  # in the batch
    lane = I32
    V = I32


class Beside(Record):
    """What `max_sum` has of a pair of rows, for folds whose sums have its largest logits."""

    max_0 = F32  # before this tile
    max_1 = F32
    sum_0 = F32
    sum_1 = F32
    new_max_0 = F32  # with this tile
    new_max_1 = F32


@cuda.jit(device=True, forceinline=True)
def _no_numbers(state: Any) -> Any:
    """Of each of the two rows of a pair, no numbers."""
    return (), ()


@cuda.jit(device=True, forceinline=True)
def _no_number() -> Any:
    """Of a row, no numbers."""
    return ()


@cuda.jit(device=True, forceinline=True)
def _merge_no_numbers(left: Any, right: Any) -> Any:
    """Of a row that two workers have seen, no numbers."""
    return ()


# Three of a fold's functions, where workers tell each other nothing: what the fold finds is in memory at once.
NOTHING_TO_TELL = {"numbers": _no_numbers, "nothing": _no_number, "merge": _merge_no_numbers}


def number_count(folds: tuple[Fold, ...]) -> int:
    """How many float32 of a row workers tell each other."""
    return sum(fold.numbers for fold in folds)


def result_names(folds: tuple[Fold, ...]) -> tuple[str, ...]:
    """What is stored for each token, in the order of `Found.results`."""
    return tuple(name for fold in folds for name in fold.results)


@functools.cache
def chain(folds: tuple[Fold, ...], n: int) -> SimpleNamespace:
    """The device functions of all folds as of one: states and numbers of each follow each other in tuples.

    `begin(rows, found)`, `step(states, z, tile, found)`, `numbers(states)`, `nothing()`, `merge(numbers, numbers)` and
    `store(numbers, row, found, survivors)`; see `tensor_core.folds`. Raises ValueError if the first fold is neither
    `max_sum` nor one that stands alone.
    """
    if not folds or not (folds[0].alone or folds[0].results[:1] == ("lse",)):
        raise ValueError(
            f"folds: must begin with max_sum, which gives the others the log-sum-exp, got {[x.name for x in folds]}"
        )
    every = _chained(folds, n, 0)
    every_step, every_merge, every_store, unknown = every.step, every.merge, every.store, np.float32(math.nan)
    of_first = folds[0].numbers

    @cuda.jit(device=True, forceinline=True)
    def step(states: Any, z: Any, tile: Any, found: Any) -> Any:
        nothing_beside = Beside(unknown, unknown, unknown, unknown, unknown, unknown)
        return every_step(states, z, tile, (unknown, unknown), nothing_beside, found)

    @cuda.jit(device=True, forceinline=True)
    def merge(left: Any, right: Any) -> Any:
        return every_merge(left, right, left[:of_first], right[:of_first])

    @cuda.jit(device=True, forceinline=True)
    def store(numbers: Any, row: Any, found: Any, survivors: Any) -> None:
        every_store(numbers, unknown, numbers[:of_first], row, found, survivors)

    return SimpleNamespace(begin=every.begin, step=step, numbers=every.numbers, nothing=every.nothing, merge=merge, store=store)


def _chained(folds: tuple[Fold, ...], n: int, at: int) -> SimpleNamespace:
    """The first fold, then the chain of the others, until none is left. `at`: the place of the first fold's first result."""
    if not folds:
        return _no_fold()
    fold, own = folds[0].make(n), folds[0].numbers
    rest = _chained(folds[1:], n, at + len(folds[0].results))
    begin_own, numbers_own, nothing_own = fold.begin, fold.numbers, fold.nothing
    step_own: Any = getattr(fold, "step", None)
    merge_own: Any = getattr(fold, "merge", None)
    store_own: Any = getattr(fold, "store", None)
    begin_rest, step_rest, numbers_rest, nothing_rest = rest.begin, rest.step, rest.numbers, rest.nothing
    merge_rest, store_rest = rest.merge, rest.store
    # Only `max_sum` has these two: the log-sum-exp of a pair's state, and of a row's numbers.
    lse_of_state: Any = getattr(fold, "lse_of_state", None)
    lse_of_numbers: Any = getattr(fold, "lse_of_numbers", None)
    gives_lse = lse_of_state is not None
    # Folds that build on it have these in place of step, merge and store.
    step_beside: Any = getattr(fold, "step_beside", None)
    merge_beside: Any = getattr(fold, "merge_beside", None)
    store_beside: Any = getattr(fold, "store_beside", None)
    is_beside = step_beside is not None

    @cuda.jit(device=True, forceinline=True)
    def begin(rows: Any, found: Any) -> Any:
        return (begin_own(rows, found, at), *begin_rest(rows, found))

    @cuda.jit(device=True, forceinline=True)
    def step(states: Any, z: Any, tile: Any, lse: Any, beside: Any, found: Any) -> Any:
        state = step_beside(states[0], z, beside) if is_beside else step_own(states[0], z, tile, lse, found, at)
        if gives_lse:
            old, lse = states[0], lse_of_state(state)
            beside = Beside(old.max_0, old.max_1, old.sum_0, old.sum_1, state.max_0, state.max_1)
        return (state, *step_rest(states[1:], z, tile, lse, beside, found))

    @cuda.jit(device=True, forceinline=True)
    def numbers(states: Any) -> Any:
        (row_0, row_1), (rest_0, rest_1) = numbers_own(states[0]), numbers_rest(states[1:])
        return row_0 + rest_0, row_1 + rest_1

    @cuda.jit(device=True, forceinline=True)
    def nothing() -> Any:
        return nothing_own() + nothing_rest()

    @cuda.jit(device=True, forceinline=True)
    def merge(left: Any, right: Any, first_left: Any, first_right: Any) -> Any:
        if is_beside:
            mine = merge_beside(left[:own], right[:own], first_left, first_right)
        else:
            mine = merge_own(left[:own], right[:own])
        return mine + merge_rest(left[own:], right[own:], first_left, first_right)

    @cuda.jit(device=True, forceinline=True)
    def store(all_numbers: Any, lse: Any, first: Any, row: Any, found: Any, survivors: Any) -> None:
        if gives_lse:
            lse = lse_of_numbers(all_numbers[:own])
        if is_beside:
            store_beside(all_numbers[:own], first, row, found, at)
        else:
            store_own(all_numbers[:own], lse, row, found, survivors, at)
        store_rest(all_numbers[own:], lse, first, row, found, survivors)

    return SimpleNamespace(begin=begin, step=step, numbers=numbers, nothing=nothing, merge=merge, store=store)


@functools.cache
def _no_fold() -> SimpleNamespace:
    """The end of the chain: no state, no numbers."""

    @cuda.jit(device=True, forceinline=True)
    def begin(rows: Any, found: Any) -> Any:
        return ()

    @cuda.jit(device=True, forceinline=True)
    def step(states: Any, z: Any, tile: Any, lse: Any, beside: Any, found: Any) -> Any:
        return ()

    @cuda.jit(device=True, forceinline=True)
    def merge(left: Any, right: Any, first_left: Any, first_right: Any) -> Any:
        return ()

    @cuda.jit(device=True, forceinline=True)
    def store(all_numbers: Any, lse: Any, first: Any, row: Any, found: Any, survivors: Any) -> None:
        return

    return SimpleNamespace(begin=begin, step=step, store=store, **NOTHING_TO_TELL | {"merge": merge})
