"""A problem's arrays as kernels take them: records of addresses."""

from __future__ import annotations

from typing import Any

from cce_numba.arguments import Problem
from cce_numba.tensor_core.matrices import pitch_bytes
from cce_numba.tensor_core.records import LogitTerms, Matrix


def address(array: Any) -> int:
    """A CuPy array's address, 0 for None."""
    return 0 if array is None else array.data.ptr


def matrix_of(array: Any) -> Matrix:
    """A (rows, columns) array whose rows can be read 16 bytes at a time (`matrices`)."""
    return Matrix(array.data.ptr, pitch_bytes(array))


def terms_of(p: Problem, uniform_weight: Any = None, entropy_weight: Any = None) -> LogitTerms:
    """What makes logits of a problem's products.

    uniform_weight, entropy_weight: (N,) float32 for the backward (`backend.Weights`), or None.
    """
    return LogitTerms(
        bias=address(p.bias),
        bias_bytes=0 if p.bias is None else p.bias.itemsize,
        softcap=p.options.softcap or 0.0,
        scale=address(p.logit_scale),
        uniform_weight=address(uniform_weight),
        class_weights=address(p.class_weights),
        entropy_weight=address(entropy_weight),
    )
