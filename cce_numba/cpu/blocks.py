"""Blocks of rows in the dtype that the products are computed in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from cce_numba import logit
from cce_numba.arguments import Problem


def ranges(total: int, step: int) -> Iterator[tuple[int, int]]:
    """Consecutive [start, stop) of at most `step`.

    >>> list(ranges(5, 2))
    [(0, 2), (2, 4), (4, 5)]
    """
    return ((start, min(start + step, total)) for start in range(0, total, step))


def rows(array: Any, index: Any, dtype: np.dtype) -> Any:
    """array[index] in `dtype`: a view where the rows are consecutive and need no conversion, else a copy."""
    if len(index) and index[-1] - index[0] == len(index) - 1:  # ascending and distinct, hence consecutive
        return array[index[0] : index[-1] + 1].astype(dtype, copy=False)
    return array[index].astype(dtype, copy=False)


def finish_logits(z: Any, p: Problem, tokens: Any, columns: Any) -> None:
    """Turns the products z (n, v) of these tokens and columns into logits, in place."""
    bias = None if p.bias is None else p.bias[columns]
    scale = None if p.logit_scale is None else p.logit_scale[tokens][:, None]
    logit.finish_in_place(z, bias, scale, p.options.softcap)


def class_weights(p: Problem, columns: slice) -> Any:
    """(v,) of the compute dtype: the class weights of these columns, 1 without any."""
    if p.class_weights is None:
        return np.ones(columns.stop - columns.start, p.compute_dtype)
    return p.class_weights[columns]
