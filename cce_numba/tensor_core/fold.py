"""A tile of logits, in registers, folds into each row's running (max, sum) and into survivor bits (paper section 4.2)."""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from cce_numba.ptx import arithmetic, control, memory
from cce_numba.survivors import RELATIVE_SLACK
from cce_numba.tensor_core.fragment import collect_bits, fill_columns, fold_columns, fold_rows, map_elements, map_rows

LOG2E = np.float32(math.log2(math.e))
LN2 = np.float32(math.log(2))
NEGATIVE_INFINITY = np.float32(-math.inf)
SLACK = np.float32(RELATIVE_SLACK)

exp2, log2, maximum = arithmetic.exp2, arithmetic.log2, arithmetic.maximum
fma, multiply = arithmetic.fma, arithmetic.multiply
shuffle_xor = control.shuffle_xor_f32


# ---- functions of one logit, for `fragment`


def larger(so_far: Any, z: Any, _: Any) -> Any:
    """NaN is in no maximum; but it is in every sum."""
    return maximum(so_far, z)


def add_exp(so_far: Any, z: Any, shift: Any) -> Any:
    """so_far + exp(z - max), with shift = log2(e) * max."""
    return so_far + exp2(fma(z, LOG2E, -shift))


def times(z: Any, scale: Any) -> Any:
    """A product, with its bias, becomes a scaled logit."""
    return z * scale


def mask_padding(z: Any, column: Any, columns: Any) -> Any:
    """-inf past the last vocabulary entry."""
    return z if column < columns else NEGATIVE_INFINITY


def cap(z: Any, _: Any, softcap: Any) -> Any:
    """softcap * tanh(z / softcap)."""
    return softcap * math.tanh(z / softcap)


def may_survive(z: Any, threshold: Any) -> Any:
    """Whether the probability may reach eps."""
    return z >= threshold


def kept_weight(column: Any, weights_smem: Any) -> Any:
    """Of a tile's column."""
    return memory.load_shared_f32_freely(np.uint32(weights_smem + np.uint32(4 * column)))


def add_weighted(so_far: Any, z: Any, weight: Any) -> Any:
    """So far, whatever a logit is that has no weight: padding is -inf."""
    return fma(z, weight, so_far) if weight != np.float32(0) else so_far


# ---- a row's state, for rows of four lanes each


@cuda.jit(device=True, forceinline=True)
def quad_max(x: Any) -> Any:
    """The largest of the four lanes that share a row."""
    x = maximum(x, shuffle_xor(x, 1))
    return maximum(x, shuffle_xor(x, 2))


@cuda.jit(device=True, forceinline=True)
def quad_sum(x: Any) -> Any:
    """The sum over the four lanes that share a row: the same bits in all of them."""
    x = x + shuffle_xor(x, 1)
    return x + shuffle_xor(x, 2)


@cuda.jit(device=True, forceinline=True)
def scaled(row_max: Any) -> Any:
    """The exponentials' shift, base 2; where all is -inf so far, 0, since -inf - -inf is NaN."""
    return multiply(row_max, LOG2E) if row_max != NEGATIVE_INFINITY else np.float32(0)


@cuda.jit(device=True, forceinline=True)
def log_sum_exp(row_max: Any, row_sum: Any) -> Any:
    """Natural log; -inf for an empty row, NaN for a lost one."""
    return row_max + LN2 * log2(row_sum)


@cuda.jit(device=True, forceinline=True)
def log_add_exp(x: Any, y: Any) -> Any:
    """log(exp(x) + exp(y)); NaN if either is. The same bits whichever comes first."""
    difference = np.float32(0) if x == y else -abs(x - y)  # both may be -inf
    return maximum(x, y) + LN2 * log2(np.float32(1) + exp2(difference * LOG2E))


@cuda.jit(device=True, forceinline=True)
def threshold_of(bound: Any, log_eps: Any) -> Any:
    """What a logit must reach to survive, given a lower bound of the row's log-sum-exp; NaN, never reached, for inf."""
    return bound - SLACK * abs(bound) + log_eps


@functools.cache
def make_bias_fragment(n: int, dtype: np.dtype) -> Any:
    """`fragment = bias_fragment(first_column, bias, V)`; bias the address of (V,) numbers of `dtype`."""
    load, itemsize = make_load(dtype), dtype.itemsize

    def bias_of(column: Any, bias: Any, V: Any) -> Any:
        return load(bias + np.uint64(itemsize * column)) if column < V else np.float32(0)

    return fill_columns(n, bias_of, types.uint64, types.int32)


@functools.cache
def make_load(dtype: np.dtype) -> Any:
    """The device function that reads a number of `dtype` at an address, as float32."""
    widen = arithmetic.widen_f16 if dtype == np.float16 else arithmetic.widen_bf16

    @cuda.jit(device=True, forceinline=True)
    def load(address: Any) -> Any:
        if is_float32:
            return memory.load_global_f32(address)
        return widen(memory.load_global_u16(address))

    is_float32 = dtype == np.float32
    return load


@functools.cache
def make_fold(n: int) -> SimpleNamespace:
    """Device functions for fragments of n columns: `update_rows`, `scale_rows`, `mask_padding`, `cap`, `survivor_words`,
    `add_to_totals`."""
    row_max, row_exp_sum = fold_rows(n, larger), fold_rows(n, add_exp)

    @cuda.jit(device=True, forceinline=True)
    def update_rows(fragment: Any, max_0: Any, max_1: Any, sum_0: Any, sum_1: Any) -> Any:
        """The rows' (max, max, sum, sum) with this tile's logits."""
        zero = np.float32(0)
        new_0, new_1 = row_max(fragment, max_0, max_1, zero, zero)
        new_0, new_1 = quad_max(new_0), quad_max(new_1)
        shift_0, shift_1 = scaled(new_0), scaled(new_1)
        total_0, total_1 = row_exp_sum(fragment, zero, zero, shift_0, shift_1)
        # The earlier shift must be the very number that was subtracted: any other would shift the sum a little with every tile.
        sum_0 = sum_0 * exp2(multiply(max_0, LOG2E) - shift_0) + quad_sum(total_0)
        sum_1 = sum_1 * exp2(multiply(max_1, LOG2E) - shift_1) + quad_sum(total_1)
        return new_0, new_1, sum_0, sum_1

    return SimpleNamespace(
        update_rows=update_rows,
        scale_rows=map_rows(n, times),
        mask_padding=map_elements(n, mask_padding, types.int32),
        cap=map_elements(n, cap, types.float32),
        survivor_words=collect_bits(n, may_survive),
        add_to_totals=fold_columns(n, kept_weight, add_weighted, types.uint32),
    )
