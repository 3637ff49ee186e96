"""A tile of products in registers becomes a tile of logits: bias, scale, softcap, and -inf for what is past the vocabulary."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from cce_numba.launch.inlined import finish
from cce_numba.ptx import memory
from cce_numba.tensor_core.exponentials import NEGATIVE_INFINITY
from cce_numba.tensor_core.fragment import fill_columns, map_elements, map_rows
from cce_numba.tensor_core.numbers import make_load

_HALF_BYTES = 8 * 4  # from the scale of a row to that of the row 8 further down


def times(z: Any, scale: Any) -> Any:
    """A product, with its bias, times the token's scale."""
    return finish(z, None, scale, None)


def mask_padding(z: Any, column: Any, columns: Any) -> Any:
    """-inf past the last vocabulary entry."""
    return z if column < columns else NEGATIVE_INFINITY


def cap(z: Any, _: Any, softcap: Any) -> Any:
    """softcap * tanh(z / softcap)."""
    return finish(z, None, None, softcap)


@functools.cache
def make_logit_of(capped: bool, scaled: bool) -> Any:
    """The device function `z = logit_of(x, row, softcap)`: the logit of a product with its bias.

    row: the token's `RowWeights`. capped, scaled: see `gradient.make_gradient`.
    """

    @cuda.jit(device=True, forceinline=True)
    def logit_of(x: Any, row: Any, softcap: Any) -> Any:
        if scaled:
            x = finish(x, None, row.scale, None)
        if capped:
            x = finish(x, None, None, softcap)
        return x

    return logit_of


@functools.cache
def make_finish_logits(n: int, capped: bool, scaled: bool) -> Any:
    """The device function `z = finish_logits(z, scales_smem, column, softcap, V, is_last)` for fragments of n columns.

    z holds products, to which the bias has been added. scales_smem: shared address of the scale, a float32, of the lane's first
    row. column: the lane's first, counted from the vocabulary's beginning. is_last: whether the tile reaches past V. Padding is
    masked last, so that no bias and no cap can lift it.
    """
    scale_rows = map_rows(n, times)
    cap_elements, mask_elements = map_elements(n, cap, types.float32), map_elements(n, mask_padding, types.int32)
    load = memory.load_shared_f32

    @cuda.jit(device=True, forceinline=True)
    def finish_logits(z: Any, scales_smem: Any, column: Any, softcap: Any, V: Any, is_last: Any) -> Any:
        if scaled:
            z = scale_rows(z, load(scales_smem), load(scales_smem + np.uint32(_HALF_BYTES)))
        if capped:
            z = cap_elements(z, column, softcap)
        if is_last:
            z = mask_elements(z, column, V)
        return z

    return finish_logits


@functools.cache
def make_bias_fragment(n: int, dtype: np.dtype) -> Any:
    """`fragment = bias_fragment(first_column, bias, V)`: each column's bias, 0 past V. bias: address of (V,) of `dtype`."""
    load, itemsize = make_load(dtype), dtype.itemsize

    def bias_of(column: Any, bias: Any, V: Any) -> Any:
        return load(bias + np.uint64(itemsize * column)) if column < V else np.float32(0)

    return fill_columns(n, bias_of, types.uint64, types.int32)
