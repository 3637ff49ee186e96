"""Reductions over the four lanes that share a row of a tile (`ptx.fragment`); each leaves the same bits in all four."""

from __future__ import annotations

from typing import Any

from numba import cuda

from cce_numba.ptx import arithmetic, control

maximum, shuffle_xor = arithmetic.maximum, control.shuffle_xor_f32


@cuda.jit(device=True, forceinline=True)
def quad_max(x: Any) -> Any:
    """The largest of the four lanes' float32; NaN only if all are."""
    x = maximum(x, shuffle_xor(x, 1))
    return maximum(x, shuffle_xor(x, 2))


@cuda.jit(device=True, forceinline=True)
def quad_sum(x: Any) -> Any:
    """The sum of the four lanes' float32."""
    x = x + shuffle_xor(x, 1)
    return x + shuffle_xor(x, 2)
