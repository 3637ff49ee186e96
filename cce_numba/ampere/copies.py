"""Rows on their way to shared memory: what one of the 256 threads copies of a stage, 16 bytes at a time.

Eight threads share the 128 bytes of a row, and put their 16 bytes where the swizzle wants them (`product`). A thread's rows are
32 apart, so its 16 bytes have the same place in the swizzle's pattern in all of them.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import cuda

from cce_numba.ampere.tiles import ROW_BYTES
from cce_numba.ptx import memory

ROWS_AT_ONCE = 32  # that 256 threads copy
ROWS_BYTES = ROWS_AT_ONCE * ROW_BYTES


@cuda.jit(device=True, forceinline=True)
def place_of(thread: Any) -> Any:
    """The place, in bytes, of the thread's 16 bytes of its first row, in rows that begin at a multiple of 128 bytes."""
    part, row = np.uint32(thread & 7), np.uint32(thread >> 3)
    return np.uint32(row * np.uint32(ROW_BYTES) + ((part ^ (row & np.uint32(7))) << np.uint32(4)))


@functools.cache
def make_copy_row(whole: bool) -> Any:
    """`copy_row(place, source, row, pitch_bytes, left_bytes)`: copies the thread's 16 bytes of a row, and zeros past its end.

    place: shared address. source: global address of the thread's 16 bytes in row 0. pitch_bytes: from one row to the next.
    left_bytes: what is left of the row from there on. whole: rows are a multiple of 16 bytes long.
    """

    @cuda.jit(device=True, forceinline=True)
    def copy_row(place: Any, source: Any, row: Any, pitch_bytes: Any, left_bytes: Any) -> None:
        """A row whose number is negative is nobody's, and becomes zeros."""
        if whole:
            present = np.int32(row) if left_bytes > 0 else np.int32(-1)
            memory.copy_async_16_of_row(np.uint32(place), source, present, np.uint32(pitch_bytes))
        else:
            present_bytes = np.uint32(min(16, max(0, left_bytes))) if row >= 0 else np.uint32(0)
            offset = np.uint64(np.uint32(max(row, 0))) * np.uint64(np.uint32(pitch_bytes))
            memory.copy_async_16(np.uint32(place), np.uint64(source + offset), present_bytes)

    return copy_row
