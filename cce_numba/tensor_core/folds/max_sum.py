"""The running (max, sum of exponentials) of a row, and what they come to: its log-sum-exp (paper section 4.2).

The largest logit and the logarithm of the sum of exp(z - largest) are kept apart. Their sum, the log-sum-exp, is as large as
logits are, and so is what is subtracted from it: the digits of a small loss would be lost.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import numpy as np
from numba import cuda

from cce_numba import folds
from cce_numba.launch.record import Record
from cce_numba.ptx import arithmetic
from cce_numba.tensor_core.exponentials import LOG2E, NEGATIVE_INFINITY, log_of_sum, log_sum_exp, residual_of, shift_of
from cce_numba.tensor_core.folds.chain import Fold
from cce_numba.tensor_core.fragment import fold_rows
from cce_numba.tensor_core.quads import quad_max, quad_sum
from cce_numba.tensor_core.records import F32
from cce_numba.tensor_core.tokens import token_at

exp2, fma, maximum, multiply = arithmetic.exp2, arithmetic.fma, arithmetic.maximum, arithmetic.multiply
LSE, MAX_LOGIT, LOG_SUM = 0, 1, 2  # places of the results


class MaxSums(Record):
    """Of a pair of rows: the largest logit, and the sum of exponentials with its shift (`exponentials`)."""

    max_0 = F32
    max_1 = F32
    sum_0 = F32
    sum_1 = F32


def larger(so_far: Any, z: Any, _: Any) -> Any:
    """The larger of the two. A NaN is left out here, and gets into the sum of exponentials."""
    return maximum(so_far, z)


def add_exp(so_far: Any, z: Any, shift: Any) -> Any:
    """so_far + exp(z - max), where shift = log2(e) * max."""
    return so_far + exp2(fma(z, LOG2E, -shift))


@cuda.jit(device=True, forceinline=True)
def rescaled(row_sum: Any, row_max: Any, shift: Any) -> Any:
    """A sum that was made with the shift of row_max, turned into one with another shift.

    `multiply` must give that first shift bit by bit, or the sum would change by the difference.
    """
    return multiply(row_sum, exp2(multiply(row_max, LOG2E) - shift))


@cuda.jit(device=True, forceinline=True)
def earlier_log_sum(token: Any, found: Any) -> Any:
    """(max, base-2 logarithm of the sum) of what earlier parts of the vocabulary have given a token.

    This fold is the first, so its results are.
    """
    largest = found.results[MAX_LOGIT * found.pitch + token]
    log_sum = found.results[LOG_SUM * found.pitch + token]
    return largest, fma(log_sum, LOG2E, residual_of(largest))


@cuda.jit(device=True, forceinline=True)
def earlier(position: Any, rows: Any, found: Any) -> Any:
    """(max, sum) of what earlier parts of the vocabulary have given the token at a position."""
    largest, log_sum = earlier_log_sum(token_at(rows.tokens, min(position, rows.n_listed - 1)), found)
    return largest, exp2(log_sum)


@functools.cache
def make(n: int) -> SimpleNamespace:
    """See `tensor_core.folds`. The numbers that workers tell each other are a row's max and sum."""
    row_max, row_exp_sum = fold_rows(n, larger), fold_rows(n, add_exp)

    @cuda.jit(device=True, forceinline=True)
    def begin(rows: Any, found: Any, at: Any) -> Any:
        """The pair's state before the first tile: nothing, or what earlier parts of the vocabulary have given."""
        max_0 = max_1 = NEGATIVE_INFINITY
        sum_0 = sum_1 = np.float32(0)
        if rows.resumes:
            max_0, sum_0 = earlier(rows.position_0, rows, found)
            max_1, sum_1 = earlier(rows.position_1, rows, found)
        return MaxSums(max_0, max_1, sum_0, sum_1)

    @cuda.jit(device=True, forceinline=True)
    def step(state: Any, z: Any, tile: Any, lse: Any, found: Any, at: Any) -> Any:
        """Folds half a tile of logits: the maxima of two rows, then the sums of exponentials rescaled to them."""
        zero = np.float32(0)
        max_0, max_1 = row_max(z, state.max_0, state.max_1, zero, zero)
        max_0, max_1 = quad_max(max_0), quad_max(max_1)
        shift_0, shift_1 = shift_of(max_0), shift_of(max_1)
        total_0, total_1 = row_exp_sum(z, zero, zero, shift_0, shift_1)
        sum_0 = rescaled(state.sum_0, state.max_0, shift_0) + quad_sum(total_0)
        sum_1 = rescaled(state.sum_1, state.max_1, shift_1) + quad_sum(total_1)
        return MaxSums(max_0, max_1, sum_0, sum_1)

    @cuda.jit(device=True, forceinline=True)
    def lse_of_state(state: Any) -> Any:
        """`(log-sum-exp of row 0, of row 1)`, natural logarithms."""
        return log_sum_exp(state.max_0, state.sum_0), log_sum_exp(state.max_1, state.sum_1)

    @cuda.jit(device=True, forceinline=True)
    def numbers(state: Any) -> Any:
        """`((max, sum) of row 0, of row 1)`, the sums with the shifts of their maxima."""
        return (state.max_0, state.sum_0), (state.max_1, state.sum_1)

    @cuda.jit(device=True, forceinline=True)
    def nothing() -> Any:
        """Of no logit: a max of -inf, and a sum of 0."""
        return NEGATIVE_INFINITY, np.float32(0)

    @cuda.jit(device=True, forceinline=True)
    def merge(left: Any, right: Any) -> Any:
        """The larger max, and both sums rescaled to it; whichever comes first."""
        largest = maximum(left[0], right[0])
        shift = shift_of(largest)
        return largest, rescaled(left[1], left[0], shift) + rescaled(right[1], right[0], shift)

    @cuda.jit(device=True, forceinline=True)
    def lse_of_numbers(numbers: Any) -> Any:
        """The log-sum-exp of a row's numbers."""
        return numbers[0] + log_of_sum(numbers[0], numbers[1])

    @cuda.jit(device=True, forceinline=True)
    def store(numbers: Any, lse: Any, row: Any, found: Any, survivors: Any, at: Any) -> None:
        """Lane 0 writes the log-sum-exp of a token, and the two parts that it is the sum of."""
        if row.lane == 0:
            found.results[(at + LSE) * found.pitch + row.token] = lse
            found.results[(at + MAX_LOGIT) * found.pitch + row.token] = numbers[0]
            found.results[(at + LOG_SUM) * found.pitch + row.token] = log_of_sum(numbers[0], numbers[1])

    return SimpleNamespace(
        begin=begin, step=step, lse_of_state=lse_of_state, numbers=numbers, nothing=nothing, merge=merge,
        lse_of_numbers=lse_of_numbers, store=store,
    )  # fmt: skip


MAX_SUM = Fold(folds.MAX_SUM, make, numbers=2, results=("lse", "max_logit", "log_sum"))
