"""Where a thread holds its part of a tile of sums: the layout that products on tensor cores of all generations share.

A warp holds 16 rows of a tile of n columns in float32. A thread's part is a `fragment`, a tuple of n / 2 floats, of which
element 4 * j + 2 * half + i stands in

    row     lane // 4 + 8 * half
    column  8 * j + 2 * (lane % 4) + i

So a thread holds two rows, and four lanes share a row. ISA 9.7.14.5.8 (`mma.m16n8k16`, matrix D) and 9.7.15.5.1.1 (`wgmma`
m64nNk16, whose warp w holds rows 16 * w to 16 * w + 15).
"""

from __future__ import annotations

import functools
from typing import Any

from llvmlite import ir
from numba.cuda import types

from cce_numba.ptx.instruction import F32, as_intrinsic


def fragment_type(n: int) -> Any:
    """The numba type of a thread's part of a tile of n columns."""
    return types.UniTuple(F32, n // 2)


@functools.cache
def zeros(n: int) -> Any:
    """A fragment of zeros: `zeros(n)()` in a kernel."""

    def define(_: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            return ir.Constant(context.get_value_type(fragment_type(n)), [ir.Constant(ir.FloatType(), 0.0)] * (n // 2))

        return fragment_type(n)(), generate

    return as_intrinsic(define, 0, f"zeros_{n}")
