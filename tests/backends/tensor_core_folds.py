"""The folds that `test_folds` adds to the tensor-core kernels: the smallest logit, and the mean logit under the softmax."""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from cce_numba.launch.record import Record
from cce_numba.ptx import arithmetic
from cce_numba.tensor_core.exponentials import LOG2E, NEGATIVE_INFINITY
from cce_numba.tensor_core.folds import Fold
from cce_numba.tensor_core.fragment import fold_columns, fold_rows
from cce_numba.tensor_core.quads import quad_max, quad_sum
from cce_numba.tensor_core.records import F32
from cce_numba.tensor_core.tokens import token_at

exp2, fma, opaque = arithmetic.exp2, arithmetic.fma, arithmetic.opaque_i32
INFINITY = np.float32(math.inf)


@cuda.jit(device=True, forceinline=True)
def earlier(position: Any, rows: Any, found: Any, at: Any) -> Any:
    """A result of earlier parts of the vocabulary."""
    return found.results[at * found.pitch + token_at(rows.tokens, min(position, rows.n_listed - 1))]


@cuda.jit(device=True, forceinline=True)
def factor(shift: Any, other: Any) -> Any:
    """exp(shift - other); 0 for a shift of nothing."""
    return exp2((shift - other) * LOG2E) if shift != NEGATIVE_INFINITY else np.float32(0)


# ---- the smallest logit


class Smallest(Record):
    """Of a pair of rows: the smallest logit among this lane's columns."""

    smallest_0 = F32
    smallest_1 = F32


def is_entry(column: Any, columns: Any) -> Any:
    """1 for a column of the vocabulary, 0 for padding, whose logit is -inf."""
    return np.float32(1) if column < columns else np.float32(0)


def smaller(so_far: Any, z: Any, counts: Any) -> Any:
    return min(so_far, z) if counts != np.float32(0) else so_far


@functools.cache
def make_smallest(n: int) -> SimpleNamespace:
    row_smallest = fold_columns(n, is_entry, smaller, types.int32)

    @cuda.jit(device=True, forceinline=True)
    def begin(rows: Any, found: Any, at: Any) -> Any:
        smallest_0 = smallest_1 = INFINITY
        if rows.resumes:
            smallest_0 = earlier(rows.position_0, rows, found, at)
            smallest_1 = earlier(rows.position_1, rows, found, at)
        return Smallest(smallest_0, smallest_1)

    @cuda.jit(device=True, forceinline=True)
    def step(state: Any, z: Any, tile: Any, lse: Any, found: Any, at: Any) -> Any:
        columns = opaque(np.int32(tile.V - tile.v_tile * n))
        own_column = np.int32(2 * (tile.thread & 3))
        smallest_0, smallest_1 = row_smallest(z, own_column, state.smallest_0, state.smallest_1, columns)
        return Smallest(smallest_0, smallest_1)

    @cuda.jit(device=True, forceinline=True)
    def numbers(state: Any) -> Any:
        return (-quad_max(-state.smallest_0),), (-quad_max(-state.smallest_1),)

    @cuda.jit(device=True, forceinline=True)
    def nothing() -> Any:
        return (INFINITY,)

    @cuda.jit(device=True, forceinline=True)
    def merge(left: Any, right: Any) -> Any:
        return (min(left[0], right[0]),)

    @cuda.jit(device=True, forceinline=True)
    def store(numbers: Any, lse: Any, row: Any, found: Any, survivors: Any, at: Any) -> None:
        if row.lane == 0:
            found.results[at * found.pitch + row.token] = numbers[0]

    return SimpleNamespace(begin=begin, step=step, numbers=numbers, nothing=nothing, merge=merge, store=store)


# ---- the mean logit under the softmax


class Expected(Record):
    """Of a pair of rows: the sums of logit * exp(logit - shift) over this lane's columns, and their shifts."""

    shift_0 = F32
    shift_1 = F32
    total_0 = F32
    total_1 = F32


def add_expected(so_far: Any, z: Any, shift: Any) -> Any:
    """so_far + z * exp(z - shift); padding is -inf and adds nothing."""
    return so_far + z * exp2((z - shift) * LOG2E) if z != NEGATIVE_INFINITY else so_far


@functools.cache
def make_expected(n: int) -> SimpleNamespace:
    row_totals = fold_rows(n, add_expected)

    @cuda.jit(device=True, forceinline=True)
    def begin(rows: Any, found: Any, at: Any) -> Any:
        """What earlier parts have given is a mean, which is a sum whose shift is the log-sum-exp: the first of all results."""
        shift_0 = shift_1 = NEGATIVE_INFINITY
        total_0 = total_1 = np.float32(0)
        if rows.resumes and cuda.threadIdx.x & 3 == 0:  # one of the four lanes that share a row
            shift_0, total_0 = earlier(rows.position_0, rows, found, 0), earlier(rows.position_0, rows, found, at)
            shift_1, total_1 = earlier(rows.position_1, rows, found, 0), earlier(rows.position_1, rows, found, at)
        return Expected(shift_0, shift_1, total_0, total_1)

    @cuda.jit(device=True, forceinline=True)
    def step(state: Any, z: Any, tile: Any, lse: Any, found: Any, at: Any) -> Any:
        total_0, total_1 = state.total_0 * factor(state.shift_0, lse[0]), state.total_1 * factor(state.shift_1, lse[1])
        total_0, total_1 = row_totals(z, total_0, total_1, lse[0], lse[1])
        return Expected(lse[0], lse[1], total_0, total_1)

    @cuda.jit(device=True, forceinline=True)
    def numbers(state: Any) -> Any:
        """A worker that had no tile for these rows has no shift but where it goes on from earlier parts: lane 0 of the four."""
        return (quad_max(state.shift_0), quad_sum(state.total_0)), (quad_max(state.shift_1), quad_sum(state.total_1))

    @cuda.jit(device=True, forceinline=True)
    def nothing() -> Any:
        return NEGATIVE_INFINITY, np.float32(0)

    @cuda.jit(device=True, forceinline=True)
    def merge(left: Any, right: Any) -> Any:
        shift = max(left[0], right[0])
        return shift, left[1] * factor(left[0], shift) + right[1] * factor(right[0], shift)

    @cuda.jit(device=True, forceinline=True)
    def store(numbers: Any, lse: Any, row: Any, found: Any, survivors: Any, at: Any) -> None:
        if row.lane == 0:
            found.results[at * found.pitch + row.token] = numbers[1] * factor(numbers[0], lse)

    return SimpleNamespace(begin=begin, step=step, numbers=numbers, nothing=nothing, merge=merge, store=store)


SMALLEST = Fold("smallest", make_smallest, numbers=1, results=("smallest",))
EXPECTED = Fold("expected", make_expected, numbers=2, results=("expected",))
