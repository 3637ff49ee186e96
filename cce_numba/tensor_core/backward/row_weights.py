"""What makes G of logits: the weights of a token, of two tokens of a thread, and of an entry."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import cuda

from cce_numba.ptx import arithmetic, memory
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
def make_two_row_weights(scaled: bool, smoothed: bool) -> Any:
    """The device function that loads the `RowWeights` of two listed tokens; scaled, smoothed: see `gradient.make_gradient`."""
    load_f32, load_i32 = memory.load_global_f32, memory.load_global_i32
    has_further = scaled or smoothed

    @cuda.jit(device=True, forceinline=True)
    def further_of(position: Any, terms: Any, tables: Any) -> Any:
        """`(scale, uniform)` of a listed token."""
        scale, uniform = np.float32(1), np.float32(0)
        if has_further:
            n = tables.row_of[position]
            if n >= 0:
                if scaled:
                    scale = load_f32(terms.scale + np.uint64(4 * np.int64(n)))
                if smoothed:
                    uniform = load_f32(terms.uniform_weight + np.uint64(4 * np.int64(n))) * tables.weight_scale[0]
        return scale, uniform

    @cuda.jit(device=True, forceinline=True)
    def row_weights(row: Any, scale: Any, uniform: Any) -> Any:
        """row: the token's address in the survey's table `rows`."""
        return RowWeights(
            softmax=load_f32(row),
            shift=load_f32(row + np.uint64(8)),
            target_weight=load_f32(row + np.uint64(4)),
            target=load_i32(row + np.uint64(12)),
            scale=scale,
            uniform=uniform,
        )

    @cuda.jit(device=True, forceinline=True)
    def two_row_weights(position: Any, row: Any, terms: Any, tables: Any) -> Any:
        """Of the tokens at `position`, an int64, of the list, and 8 further on. Weights are times the survey's scale.

        row: address of the first of the two in the survey's table `rows`. terms: a `LogitTerms`. tables: the survey's.
        """
        scale_0, uniform_0 = further_of(position, terms, tables)
        scale_1, uniform_1 = further_of(position + 8, terms, tables)
        next_row = np.uint64(row + np.uint64(8 * ROW_BYTES))
        return row_weights(row, scale_0, uniform_0), row_weights(next_row, scale_1, uniform_1)

    return two_row_weights
