"""The running (max, sum of exponentials) of a row, and its log-sum-exp (paper section 4.2)."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import numpy as np
from numba import cuda

from cce_numba import folds
from cce_numba.launch.record import Record
from cce_numba.ptx import arithmetic
from cce_numba.tensor_core.exponentials import LOG2E, NEGATIVE_INFINITY, log_add_exp, log_sum_exp, shift_of
from cce_numba.tensor_core.folds.chain import Fold
from cce_numba.tensor_core.fragment import fold_rows
from cce_numba.tensor_core.quads import quad_max, quad_sum
from cce_numba.tensor_core.records import F32
from cce_numba.tensor_core.tokens import token_at

exp2, fma, maximum, multiply = arithmetic.exp2, arithmetic.fma, arithmetic.maximum, arithmetic.multiply


class MaxSums(Record):
    """Of a pair of rows: the largest logit, and the sum of exp(logit - largest)."""

    max_0 = F32
    max_1 = F32
    sum_0 = F32
    sum_1 = F32


def larger(so_far: Any, z: Any, _: Any) -> Any:
    """NaN is in no maximum; but it is in every sum."""
    return maximum(so_far, z)


def add_exp(so_far: Any, z: Any, shift: Any) -> Any:
    """so_far + exp(z - max), where shift = log2(e) * max."""
    return so_far + exp2(fma(z, LOG2E, -shift))


@functools.cache
def make(n: int) -> SimpleNamespace:
    """See `tensor_core.folds`. The number that workers tell each other is the log-sum-exp of a row."""
    row_max, row_exp_sum = fold_rows(n, larger), fold_rows(n, add_exp)

    @cuda.jit(device=True, forceinline=True)
    def begin(rows: Any, found: Any, at: Any) -> Any:
        """The pair's state before the first tile, or the log-sum-exp that it goes on from (as a maximum with a sum of 1)."""
        max_0 = max_1 = NEGATIVE_INFINITY
        sum_0 = sum_1 = np.float32(0)
        if rows.resumes:
            sum_0 = sum_1 = np.float32(1)
            last = rows.listed - 1
            max_0 = found.results[at * found.pitch + token_at(rows.tokens, min(rows.position_0, last))]
            max_1 = found.results[at * found.pitch + token_at(rows.tokens, min(rows.position_1, last))]
        return MaxSums(max_0, max_1, sum_0, sum_1)

    @cuda.jit(device=True, forceinline=True)
    def step(state: Any, z: Any, tile: Any, lse: Any) -> Any:
        """Folds half a tile of logits: the maxima of two rows, then the sums of exponentials rescaled to them."""
        zero = np.float32(0)
        max_0, max_1 = row_max(z, state.max_0, state.max_1, zero, zero)
        max_0, max_1 = quad_max(max_0), quad_max(max_1)
        shift_0, shift_1 = shift_of(max_0), shift_of(max_1)
        total_0, total_1 = row_exp_sum(z, zero, zero, shift_0, shift_1)
        # The earlier shift must be the very number that was subtracted: any other would shift the sum a little with every tile.
        sum_0 = state.sum_0 * exp2(multiply(state.max_0, LOG2E) - shift_0) + quad_sum(total_0)
        sum_1 = state.sum_1 * exp2(multiply(state.max_1, LOG2E) - shift_1) + quad_sum(total_1)
        return MaxSums(max_0, max_1, sum_0, sum_1)

    @cuda.jit(device=True, forceinline=True)
    def lse_of_state(state: Any) -> Any:
        """`(log-sum-exp of row 0, of row 1)`, natural logarithms."""
        return log_sum_exp(state.max_0, state.sum_0), log_sum_exp(state.max_1, state.sum_1)

    @cuda.jit(device=True, forceinline=True)
    def numbers(state: Any) -> Any:
        """`((log-sum-exp of row 0,), (of row 1,))`, natural logarithms."""
        return (log_sum_exp(state.max_0, state.sum_0),), (log_sum_exp(state.max_1, state.sum_1),)

    @cuda.jit(device=True, forceinline=True)
    def nothing() -> Any:
        """The log-sum-exp of no logit: -inf."""
        return (NEGATIVE_INFINITY,)

    @cuda.jit(device=True, forceinline=True)
    def merge(left: Any, right: Any) -> Any:
        """log(exp(left) + exp(right)), whichever comes first."""
        return (log_add_exp(left[0], right[0]),)

    @cuda.jit(device=True, forceinline=True)
    def lse_of_numbers(numbers: Any) -> Any:
        """The log-sum-exp that a row's numbers are."""
        return numbers[0]

    @cuda.jit(device=True, forceinline=True)
    def store(numbers: Any, lse: Any, row: Any, found: Any, survivors: Any, at: Any) -> None:
        """Lane 0 writes the log-sum-exp of a token."""
        if row.lane == 0:
            found.results[at * found.pitch + row.token] = numbers[0]

    return SimpleNamespace(
        begin=begin, step=step, lse_of_state=lse_of_state, numbers=numbers, nothing=nothing, merge=merge,
        lse_of_numbers=lse_of_numbers, store=store,
    )  # fmt: skip


MAX_SUM = Fold(folds.MAX_SUM, make, numbers=1, results=("lse",))
