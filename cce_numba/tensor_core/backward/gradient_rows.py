"""Complete tiles of dE or dC in registers: added to what a gradient holds, and stored as float32.

Lanes hold two neighbouring numbers of a row each. The address of a row is 0 if the row is nobody's; `columns` are those that
are left in a row from an address on; and numbers are multiplied by `factor`, a float32, which takes the scale of the weights
out of them.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from cce_numba.ptx import arithmetic, memory
from cce_numba.tensor_core.fragment import change_chunks, visit_chunks
from cce_numba.tensor_core.numbers import widen
from cce_numba.tensor_core.records import F32, I32, U64

_TWO_ROWS = types.UniTuple(U64, 2)

fma, float_of_bits = arithmetic.fma, arithmetic.float_of_bits


@functools.cache
def make_add_rows(n: int, dtype: np.dtype) -> Any:
    """`sums = add_rows(sums, rows, columns, is_float32, factor)`: sums, n columns, times factor, plus what the rows hold.

    rows: addresses of the thread's first number in each of its two rows. is_float32: whether they hold float32, else `dtype`.
    """
    wide = widen(dtype)
    eight, sixteen, lower = np.int32(8), np.uint32(16), np.uint32(0xFFFF)

    @cuda.jit(device=True, forceinline=True)
    def plus(x: Any, y: Any, row: Any, column: Any, columns: Any, is_float32: Any, factor: Any) -> Any:
        """x and y times factor, plus the row's numbers at `column` and the next."""
        mine = np.uint32(1) if row != 0 and column < columns else np.uint32(0)
        address = np.uint64(row + (np.uint64(column) << np.uint64(1 + is_float32)))
        first = memory.load_if_u32(address, mine)
        second = memory.load_if_u32(np.uint64(address + np.uint64(4)), np.uint32(mine & np.uint32(is_float32)))
        old_x = float_of_bits(first) if is_float32 != 0 else wide(np.uint32(first & lower))
        old_y = float_of_bits(second) if is_float32 != 0 else wide(np.uint32(first >> sixteen))
        return fma(x, factor, old_x), fma(y, factor, old_y)

    def add(z: Any, first: Any, rows: Any, columns: Any, is_float32: Any, factor: Any) -> Any:
        """z, the thread's 8 numbers of 16 columns from `first` on, times factor, plus what the rows hold there."""
        return (
            plus(z[0], z[1], rows[0], first, columns, is_float32, factor)
            + plus(z[2], z[3], rows[1], first, columns, is_float32, factor)
            + plus(z[4], z[5], rows[0], first + eight, columns, is_float32, factor)
            + plus(z[6], z[7], rows[1], first + eight, columns, is_float32, factor)
        )

    return change_chunks(n, 16, add, _TWO_ROWS, I32, I32, F32)


@functools.cache
def make_store_rows_in_float32(n: int) -> Any:
    """`store_rows(sums, rows, columns, factor)`: stores a fragment of n columns; rows as in `make_add_rows`."""

    @cuda.jit(device=True, forceinline=True)
    def store_two(row: Any, x: Any, y: Any, first: Any, columns: Any) -> None:
        """Stores x and y to the row at column `first` and the next."""
        wanted = np.uint32(1) if row != 0 and first < columns else np.uint32(0)
        memory.store_if_2_f32(np.uint64(row + np.uint64(4 * first)), x, y, wanted)

    def store(z: Any, first: Any, rows: Any, columns: Any, factor: Any) -> Any:
        """Stores z, the thread's 4 numbers of 8 columns from `first` on."""
        store_two(rows[0], z[0] * factor, z[1] * factor, first, columns)
        store_two(rows[1], z[2] * factor, z[3] * factor, first, columns)
        return np.int32(0)

    return visit_chunks(n, 8, store, _TWO_ROWS, I32, F32)
