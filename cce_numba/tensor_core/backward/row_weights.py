"""What makes G of logits: the weights of a token, of two tokens of a thread, and of an entry."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import cuda

from cce_numba.ptx import arithmetic, memory
from cce_numba.tensor_core.exponentials import LN2, exp2, fma
from cce_numba.tensor_core.records import RowWeights

ROW_BYTES = 16  # of a row of the survey's table `rows`


@cuda.jit(device=True, forceinline=True)
def class_weight_of(entry: Any, class_weights: Any) -> Any:
    """The weight of a vocabulary entry, given the address of (V,) float32; 1 if that is 0."""
    wanted = np.uint32(1) if class_weights != 0 and entry >= 0 else np.uint32(0)
    address = np.uint64(class_weights + np.uint64(4 * np.int64(entry)))
    weight = arithmetic.float_of_bits(memory.load_if_u32(address, wanted))
    return weight if class_weights != 0 else np.float32(1)


@functools.cache
def make_row_weights(scaled: bool, smoothed: bool, entropic: bool) -> tuple[Any, Any]:
    """`(further_of, row_weights)`, device functions that load the `RowWeights` of a listed token: `row_weights(row, further)`.

    Options: see `gradient.make_gradient`.
    """
    load_f32, load_i32 = memory.load_global_f32, memory.load_global_i32
    has_further = scaled or smoothed or entropic

    @cuda.jit(device=True, forceinline=True)
    def further_of(position: Any, terms: Any, tables: Any) -> Any:
        """`(scale, uniform, entropy, log_sum)` of a listed token."""
        scale, uniform, entropy, log_sum = np.float32(1), np.float32(0), np.float32(0), np.float32(0)
        if has_further:
            n = tables.row_of[position]
            if n >= 0:
                if scaled:
                    scale = load_f32(terms.scale + np.uint64(4 * np.int64(n)))
                if smoothed:
                    uniform = load_f32(terms.uniform_weight + np.uint64(4 * np.int64(n))) * tables.weight_scale[0]
                if entropic:
                    log_sum = tables.log_sums[position]
                    weight = load_f32(terms.entropy_weight + np.uint64(4 * np.int64(n))) * tables.weight_scale[0]
                    entropy = LN2 * weight * exp2(-log_sum)
        return scale, uniform, entropy, log_sum

    @cuda.jit(device=True, forceinline=True)
    def row_weights(row: Any, further: Any) -> Any:
        """row: the token's address in the survey's table `rows`. further: of the token."""
        scale, uniform, entropy, log_sum = further
        softmax = load_f32(row)
        if entropic:
            softmax = fma(-entropy, log_sum, softmax)
        return RowWeights(
            softmax=softmax,
            shift=load_f32(row + np.uint64(8)),
            target_weight=load_f32(row + np.uint64(4)),
            target=load_i32(row + np.uint64(12)),
            scale=scale,
            uniform=uniform,
            entropy=entropy,
        )

    return further_of, row_weights


@functools.cache
def make_two_row_weights(scaled: bool, smoothed: bool, entropic: bool) -> Any:
    """The device function that loads the `RowWeights` of two listed tokens; options: see `gradient.make_gradient`."""
    further_of, row_weights = make_row_weights(scaled, smoothed, entropic)

    @cuda.jit(device=True, forceinline=True)
    def two_row_weights(position: Any, row: Any, terms: Any, tables: Any) -> Any:
        """Of the tokens at `position`, an int64, of the list, and 8 further on. Weights are times the survey's scale.

        row: address of the first of the two in the survey's table `rows`. terms: a `LogitTerms`. tables: the survey's.
        """
        further_0, further_1 = further_of(position, terms, tables), further_of(position + 8, terms, tables)
        next_row = np.uint64(row + np.uint64(8 * ROW_BYTES))
        return row_weights(row, further_0), row_weights(next_row, further_1)

    return two_row_weights
