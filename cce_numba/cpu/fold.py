"""The element-wise work on a block of logits while it is still in the cache: online log-sum-exp, survivors, G.

Compiled by Numba for the CPU. The loops are plain so that LLVM turns them into vector instructions; NaN must pass through
every one of them, so the only liberties taken with floating point are to reorder sums and to fuse multiply-adds.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload

from cce_numba.survivors import RELATIVE_SLACK

_LOG2_E = np.float32(1.4426950408889634)
# ln 2 in two parts, the first exact in few bits, so that x - n ln 2 loses nothing (Cody and Waite's reduction).
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_ROUND = np.float32(1.5 * 2**23)  # adding it rounds to an integer, which then stands in the low bits
_SMALLEST = np.float32(-87.0)  # exp of less is below the smallest normal float32
_COEFFICIENTS = tuple(np.float32(1 / math.factorial(k)) for k in range(8))
_ZERO, _ONE = np.float32(0), np.float32(1)


@njit(cache=True, fastmath={"contract"})
def exp_float32(x: Any) -> Any:
    """exp of a float32 <= 88, to 2 units in the last place; 0 below -87; NaN stays NaN. Unlike libm's, it vectorises."""
    clamped = _SMALLEST if x < _SMALLEST else x
    shifted = clamped * _LOG2_E + _ROUND
    n = shifted - _ROUND
    r = (clamped - n * _LN2_HIGH) - n * _LN2_LOW
    c0, c1, c2, c3, c4, c5, c6, c7 = _COEFFICIENTS  # Taylor: on |r| <= ln(2) / 2 the first term left out is below 2^-27
    p = ((((((c7 * r + c6) * r + c5) * r + c4) * r + c3) * r + c2) * r + c1) * r + c0
    exponent = np.float32(shifted).view(np.int32) + np.int32(127)
    power_of_two = np.int32(exponent << np.int32(23)).view(np.float32)
    return _ZERO if x < _SMALLEST else p * power_of_two


def _exp(x):  # type: ignore[no-untyped-def]  # Numba compares the parameters of these pairs, annotations included
    """The vectorised exp for float32, libm's for float64."""


def _rounded(x, z):  # type: ignore[no-untyped-def]
    """x in the dtype of the array z."""


@overload(_exp)
def _exp_by_dtype(x):  # type: ignore[no-untyped-def]
    if x == types.float32:
        return lambda x: exp_float32(x)
    return lambda x: math.exp(x)


@overload(_rounded)
def _rounded_by_dtype(x, z):  # type: ignore[no-untyped-def]
    dtype = z.dtype
    return lambda x, z: dtype(x)


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract"})
def _sum_exp(row: Any, shift: Any) -> Any:
    """Sum of exp(row - shift), in the dtype of the row."""
    total = shift * _ZERO + _ZERO
    for v in range(row.shape[0]):
        total += _exp(row[v] - shift)
    return total


@njit(cache=True, nogil=True)
def _flag(row: Any, threshold: Any, flags: Any) -> None:
    """Flags what is not below the threshold; NaN is not below anything."""
    for v in range(row.shape[0]):
        flags[v] |= not (row[v] < threshold)


@njit(cache=True, nogil=True)
def fold_block(
    z: Any, block_max: Any, running_max: Any, running_sum: Any, target_logit: Any, log_eps: float, flags: Any
) -> None:
    """Folds logits z (n, v) into the running (max, sum) of each row, and flags the survivors among its columns.

    block_max (n,): row maxima of z. running_max, running_sum (n,) float64: paper section 4.2's online log-sum-exp.
    flags (v,) bool, or empty to record none: a column is flagged unless every row is sure that its probability is below
    eps, judged by a lower bound of the final log-sum-exp: the target's logit, and the running one so far.
    """
    for n in range(z.shape[0]):
        old_max, new_max = running_max[n], np.float64(block_max[n])
        if not new_max > old_max:  # nor for a NaN, which is in the sum anyway
            new_max = old_max
        shift = 0.0 if new_max == -np.inf else new_max  # exp(-inf - 0) is 0, where exp(-inf - -inf) is NaN
        total = running_sum[n] * math.exp(old_max - shift) + np.float64(_sum_exp(z[n], _rounded(shift, z)))
        running_max[n], running_sum[n] = new_max, total
        if flags.shape[0] > 0:
            bound = np.float64(target_logit[n])
            if total > 0 and math.log(total) + shift > bound:
                bound = np.float64(math.log(total) + shift)
            _flag(z[n], _rounded(bound - RELATIVE_SLACK * abs(bound) + log_eps, z), flags)


@njit(cache=True, nogil=True, fastmath={"contract"})
def gradient_block(
    z: Any,
    lse: Any,
    softmax_weight: Any,
    target_weight: Any,
    uniform_weight: Any,
    target_column: Any,
    class_weights: Any,
    inverse_softcap: Any,
) -> None:
    """Turns logits z (n, v) into G = softmax_weight * softmax - target_weight * onehot - uniform_weight * class_weights.

    Times the softcap's derivative. In place. lse and weights: (n,) of z's dtype; class_weights (v,), or empty for no such term.
    target_column (n,): where the row's target stands among the columns, or -1. inverse_softcap: 1 / softcap in z's dtype, or 0
    without one.
    """
    for n in range(z.shape[0]):
        row, column, weight, log_sum_exp = z[n], target_column[n], softmax_weight[n], lse[n]
        at_target = row[column] if column >= 0 else row[0]
        if class_weights.shape[0] > 0:
            uniform = uniform_weight[n]
            for v in range(row.shape[0]):
                tanh = row[v] * inverse_softcap
                row[v] = (weight * _exp(row[v] - log_sum_exp) - uniform * class_weights[v]) * (_ONE - tanh * tanh)
        elif inverse_softcap == _ZERO:
            for v in range(row.shape[0]):
                row[v] = weight * _exp(row[v] - log_sum_exp)
        else:
            for v in range(row.shape[0]):
                tanh = row[v] * inverse_softcap
                row[v] = weight * _exp(row[v] - log_sum_exp) * (_ONE - tanh * tanh)
        if column >= 0:
            tanh = at_target * inverse_softcap
            row[column] -= target_weight[n] * (_ONE - tanh * tanh)


@njit(cache=True, nogil=True)
def add_rows(destination: Any, rows: Any, source: Any) -> None:
    """destination[rows[k], d] += source[k, d], rows distinct; one pass over memory."""
    for k in range(rows.shape[0]):
        row = rows[k]
        for d in range(source.shape[1]):
            destination[row, d] += source[k, d]
