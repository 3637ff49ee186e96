"""Exponentials and logarithms in base 2, of which the log-sum-exp is made.

An exponential is 2^(log2(e) * z - shift), where shift is log2(e) * row_max, rounded (`shift_of`). So a sum of exponentials is
off by a factor of 2^`residual_of(row_max)`: nothing to speak of for logits of some tens, but 2 for logits of 2^24. The factor
cancels where a probability is made of such a sum and of an exponential with the same shift.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import cuda

from cce_numba.ptx import arithmetic

LOG2E = np.float32(math.log2(math.e))
LN2 = np.float32(math.log(2))
NEGATIVE_INFINITY = np.float32(-math.inf)

exp2, fma, log2, multiply = arithmetic.exp2, arithmetic.fma, arithmetic.log2, arithmetic.multiply


@cuda.jit(device=True, forceinline=True)
def shift_of(row_max: Any) -> Any:
    """What is subtracted from base-2 exponents: log2(e) * row_max; 0 where all is -inf so far, since -inf - -inf is NaN."""
    return multiply(row_max, LOG2E) if row_max != NEGATIVE_INFINITY else np.float32(0)


@cuda.jit(device=True, forceinline=True)
def residual_of(row_max: Any) -> Any:
    """log2(e) * row_max - shift_of(row_max), which rounding has taken away; 0 where all is -inf so far."""
    return fma(row_max, LOG2E, -multiply(row_max, LOG2E)) if row_max != NEGATIVE_INFINITY else np.float32(0)


@cuda.jit(device=True, forceinline=True)
def log_sum_exp(row_max: Any, row_sum: Any) -> Any:
    """About the natural logarithm of exp(row_max) * row_sum, for bounds; -inf for an empty row, NaN for a lost one."""
    return row_max + LN2 * log2(row_sum)


@cuda.jit(device=True, forceinline=True)
def log_of_sum(row_max: Any, row_sum: Any) -> Any:
    """The natural logarithm of the sum of exp(z - row_max), out of a sum of exponentials with `shift_of(row_max)`.

    -inf for an empty row, NaN for a lost one. Not `log2`, whose error near 1 is not small beside the result.
    """
    return math.log(row_sum) - LN2 * residual_of(row_max)
