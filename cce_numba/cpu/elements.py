"""Work on the elements of a block, compiled by Numba for the CPU: exponentials, G, sums of rows. `folds/` has more of it.

The loops are plain so that LLVM turns them into vector instructions. NaN must pass through every one of them, so the only
liberties taken with floating point are to reorder sums and to fuse multiply-adds.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import types
from numba.extending import overload, register_jitable

from cce_numba.cpu.compiled import compiled
from cce_numba.survivors import make_scale

_LOG2_E = np.float32(1.4426950408889634)
# ln 2 in two parts, the first exact in few bits, so that x - n ln 2 loses nothing (Cody and Waite's reduction).
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_ROUND = np.float32(1.5 * 2**23)  # adding it rounds to an integer, which then stands in the low bits
_SMALLEST = np.float32(-87.0)  # exp of less is below the smallest normal float32
_COEFFICIENTS = tuple(np.float32(1 / math.factorial(k)) for k in range(8))
_ZERO, _ONE = np.float32(0), np.float32(1)
_scale_of = register_jitable(make_scale(np.float64))


@compiled(fastmath={"contract"})
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


def exp(x):  # type: ignore[no-untyped-def]  # Numba compares the parameters of these pairs, annotations included
    """In compiled functions: the vectorised exp for float32, libm's for float64. In plain Python: NumPy's."""
    return np.exp(x)


def rounded(x, z):  # type: ignore[no-untyped-def]
    """x in the dtype of the array z."""
    return z.dtype.type(x)


@overload(exp)
def _exp_by_dtype(x):  # type: ignore[no-untyped-def]
    if x == types.float32:
        return lambda x: exp_float32(x)
    return lambda x: math.exp(x)


@overload(rounded)
def _rounded_by_dtype(x, z):  # type: ignore[no-untyped-def]
    dtype = z.dtype
    return lambda x, z: dtype(x)


@compiled(nogil=True, fastmath={"contract"})
def gradient_block(
    z: Any,
    max_logit: Any,
    log_sum: Any,
    softmax_weight: Any,
    entropy_weight: Any,
    target_weight: Any,
    uniform_weight: Any,
    target_column: Any,
    class_weights: Any,
    inverse_softcap: Any,
    with_entropy: bool,
) -> None:
    """Turns logits z (n, v) into G, in place, as `backend.Weights` has it; times the softcap's derivative.

    max_logit, log_sum (`backend.Statistics`) and weights: (n,) of z's dtype, but target_weight (n, K). class_weights (v,), or
    empty for no such term; entropy_weight counts where `with_entropy`.
    target_column (n, K): where the row's targets stand among the columns, or -1. inverse_softcap: 1 / softcap in z's dtype, or
    0 without one.
    """
    K = target_column.shape[1]
    at_target = np.zeros(K, z.dtype)
    for n in range(z.shape[0]):
        row, weight, largest, log_of_sum = z[n], softmax_weight[n], max_logit[n], log_sum[n]
        for k in range(K):
            column = target_column[n, k]
            at_target[k] = row[column] if column >= 0 and inverse_softcap != _ZERO else _ZERO  # -inf times 0 would be NaN
        if class_weights.shape[0] > 0 or with_entropy:
            uniform, of_log = uniform_weight[n], entropy_weight[n]
            for v in range(row.shape[0]):
                log_p, slope = (row[v] - largest) - log_of_sum, _ONE
                if inverse_softcap != _ZERO:
                    tanh = row[v] * inverse_softcap
                    slope = _ONE - tanh * tanh
                p = exp(log_p)
                g = weight * p
                if with_entropy and p > _ZERO:
                    g += of_log * (p * log_p)
                if class_weights.shape[0] > 0:
                    g -= uniform * class_weights[v]
                row[v] = g * slope
        elif inverse_softcap == _ZERO:
            for v in range(row.shape[0]):
                row[v] = weight * exp((row[v] - largest) - log_of_sum)
        else:
            for v in range(row.shape[0]):
                tanh = row[v] * inverse_softcap
                row[v] = weight * exp((row[v] - largest) - log_of_sum) * (_ONE - tanh * tanh)
        for k in range(K):
            column = target_column[n, k]
            if column >= 0:
                tanh = at_target[k] * inverse_softcap
                row[column] -= target_weight[n, k] * (_ONE - tanh * tanh)


@compiled(nogil=True)
def scales_of_columns(largest: Any, u: Any, eps: float, scales: Any) -> None:
    """Writes to scales (v,) what the unbiased filter multiplies columns of G by: `survivors.make_scale`.

    largest (v,): natural logarithms of the largest probabilities; NaN for a column that is kept as it is. u (v,): the draws.
    """
    for v in range(largest.shape[0]):
        scales[v] = _scale_of(math.exp(np.float64(largest[v])), eps, np.float64(u[v]))


@compiled(nogil=True)
def column_scales(z: Any, max_logit: Any, log_sum: Any, u: Any, eps: float, scales: Any) -> None:
    """Writes to scales (v,) what the unbiased filter multiplies columns of G by: `survivors.make_scale`.

    z (n, v): logits of a block of tokens, none of which is lost. max_logit and log_sum (n,): of the tokens. u (v,): the draws.
    """
    largest = np.full(z.shape[1], -np.inf, z.dtype)  # natural log of the largest probability
    for n in range(z.shape[0]):
        row = z[n]
        for v in range(row.shape[0]):
            log_probability = (row[v] - max_logit[n]) - log_sum[n]
            largest[v] = log_probability if log_probability > largest[v] else largest[v]
    scales_of_columns(largest, u, eps, scales)


@compiled(nogil=True)
def add_rows(destination: Any, rows: Any, source: Any) -> None:
    """destination[rows[k], d] += source[k, d], rows distinct; one pass over memory."""
    for k in range(rows.shape[0]):
        row = rows[k]
        for d in range(source.shape[1]):
            destination[row, d] += source[k, d]
