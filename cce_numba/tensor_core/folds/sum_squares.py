"""The sum of squared probabilities: the sum of exponentials squared, with `exponentials.shift_of`; see `cce_numba.folds`."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import numpy as np
from numba import cuda

from cce_numba import folds
from cce_numba.launch.record import Record
from cce_numba.ptx import arithmetic
from cce_numba.tensor_core.exponentials import LOG2E, shift_of
from cce_numba.tensor_core.folds.chain import Fold
from cce_numba.tensor_core.folds.max_sum import earlier_log_sum
from cce_numba.tensor_core.fragment import fold_rows
from cce_numba.tensor_core.quads import quad_sum
from cce_numba.tensor_core.records import F32
from cce_numba.tensor_core.tokens import token_at

exp2, fma, maximum, multiply = arithmetic.exp2, arithmetic.fma, arithmetic.maximum, arithmetic.multiply


class Totals(Record):
    """Of a pair of rows: the sums of squared exponentials, with the shifts of the rows' largest logits."""

    total_0 = F32
    total_1 = F32


def add_square(so_far: Any, z: Any, shift: Any) -> Any:
    """so_far + exp(z - max)**2, where shift = log2(e) * max."""
    power = exp2(fma(z, LOG2E, -shift))
    return fma(power, power, so_far)


@cuda.jit(device=True, forceinline=True)
def rescaled(total: Any, row_max: Any, shift: Any) -> Any:
    """A total that was made with the shift of row_max, turned into one with another shift."""
    weight = exp2(multiply(row_max, LOG2E) - shift)
    return total * weight * weight


@functools.cache
def make(n: int) -> SimpleNamespace:
    """See `tensor_core.folds`."""
    add_squares = fold_rows(n, add_square)

    @cuda.jit(device=True, forceinline=True)
    def earlier(position: Any, rows: Any, found: Any, at: Any) -> Any:
        """The total of what earlier parts of the vocabulary have given; 0 of a row that is lost, or has had nothing."""
        token = token_at(rows.tokens, min(position, rows.n_listed - 1))
        _, log_sum = earlier_log_sum(token, found)
        row_sum, total = exp2(log_sum), np.float32(0)
        if row_sum > np.float32(0):
            total = row_sum * row_sum * found.results[at * found.pitch + token]
        return total

    @cuda.jit(device=True, forceinline=True)
    def begin(rows: Any, found: Any, at: Any) -> Any:
        """The pair's totals: 0, or what earlier parts of the vocabulary have given."""
        total_0 = total_1 = np.float32(0)
        if rows.resumes:
            total_0 = earlier(rows.position_0, rows, found, at)
            total_1 = earlier(rows.position_1, rows, found, at)
        return Totals(total_0, total_1)

    @cuda.jit(device=True, forceinline=True)
    def step_beside(state: Any, z: Any, beside: Any) -> Any:
        """Adds half a tile of logits to the two rows' totals, rescaled to the rows' new largest logits."""
        zero, shift_0, shift_1 = np.float32(0), shift_of(beside.new_max_0), shift_of(beside.new_max_1)
        added_0, added_1 = add_squares(z, zero, zero, shift_0, shift_1)
        total_0 = rescaled(state.total_0, beside.max_0, shift_0) + quad_sum(added_0)
        total_1 = rescaled(state.total_1, beside.max_1, shift_1) + quad_sum(added_1)
        return Totals(total_0, total_1)

    @cuda.jit(device=True, forceinline=True)
    def numbers(state: Any) -> Any:
        """The two rows' totals."""
        return (state.total_0,), (state.total_1,)

    @cuda.jit(device=True, forceinline=True)
    def nothing() -> Any:
        """A total of 0."""
        return (np.float32(0),)

    @cuda.jit(device=True, forceinline=True)
    def merge_beside(left: Any, right: Any, first_left: Any, first_right: Any) -> Any:
        """Both totals rescaled to the larger max; whichever comes first."""
        shift = shift_of(maximum(first_left[0], first_right[0]))
        return (rescaled(left[0], first_left[0], shift) + rescaled(right[0], first_right[0], shift),)

    @cuda.jit(device=True, forceinline=True)
    def store_beside(numbers: Any, first: Any, row: Any, found: Any, at: Any) -> None:
        """The total over the squared sum of exponentials: NaN where the log-sum-exp is NaN, or all logits are -inf."""
        if row.lane == 0:
            found.results[at * found.pitch + row.token] = numbers[0] / (first[1] * first[1])

    return SimpleNamespace(
        begin=begin, step_beside=step_beside, numbers=numbers, nothing=nothing, merge_beside=merge_beside,
        store_beside=store_beside,
    )  # fmt: skip


SUM_SQUARES = Fold(folds.SUM_SQUARES, make, numbers=1, results=("sum_squares",))
