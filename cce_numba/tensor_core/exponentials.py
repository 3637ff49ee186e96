"""Exponentials and logarithms in base 2, of which the log-sum-exp is made."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import cuda

from cce_numba.ptx import arithmetic

LOG2E = np.float32(math.log2(math.e))
LN2 = np.float32(math.log(2))
NEGATIVE_INFINITY = np.float32(-math.inf)

exp2, log2, maximum, multiply = arithmetic.exp2, arithmetic.log2, arithmetic.maximum, arithmetic.multiply


@cuda.jit(device=True, forceinline=True)
def shift_of(row_max: Any) -> Any:
    """What is subtracted from base-2 exponents: log2(e) * row_max; 0 where all is -inf so far, since -inf - -inf is NaN."""
    return multiply(row_max, LOG2E) if row_max != NEGATIVE_INFINITY else np.float32(0)


@cuda.jit(device=True, forceinline=True)
def log_sum_exp(row_max: Any, row_sum: Any) -> Any:
    """The natural logarithm of exp(row_max) * row_sum; -inf for an empty row, NaN for a lost one."""
    return row_max + LN2 * log2(row_sum)


@cuda.jit(device=True, forceinline=True)
def log_add_exp(x: Any, y: Any) -> Any:
    """log(exp(x) + exp(y)); NaN if either is. The bits are the same whichever comes first."""
    difference = np.float32(0) if x == y else -abs(x - y)  # both may be -inf
    return maximum(x, y) + LN2 * log2(np.float32(1) + exp2(difference * LOG2E))
