"""A complete tile of dE or dC leaves for its rows of the gradient, in the inputs' dtype or in float32.

Lanes hold two neighbouring numbers of a row each, and memory wants whole rows. Numbers of 16 bits go through shared memory, 8
KiB of it for each consumer, with the 128-byte swizzle. Numbers of 32 bits go as they are, 8 bytes of a lane at a time.

In all that follows, the address of a row is 0 if the row is nobody's; `columns` are those that are left in a row from an
address on; and numbers are multiplied by `factor`, a float32, which takes the scale of the weights out of them.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from cce_numba.hopper.backward.tiles import PANEL, STAGING_BYTES
from cce_numba.ptx import arithmetic, memory
from cce_numba.tensor_core.backward.gradient_rows import make_add_rows, make_store_rows_in_float32
from cce_numba.tensor_core.fragment import visit_chunks
from cce_numba.tensor_core.records import F32, I32, U32, U64

_ROW_BYTES = np.uint32(2 * PANEL)
_WARP_BYTES = np.uint32(STAGING_BYTES // 4)
_TWO_ROWS, _FOUR_ROWS = types.UniTuple(U64, 2), types.UniTuple(U64, 4)

fma, float_of_bits = arithmetic.fma, arithmetic.float_of_bits
store_matrices, load_shared_4 = memory.store_matrices, memory.load_shared_4_u32


@functools.cache
def make_store_rows(n: int, dtype: np.dtype) -> Any:
    """`store_rows(sums, staging, rows, columns, factor)`: stores a fragment of n columns as 16-bit `dtype`, a panel at a time.

    staging: address of the consumer's shared memory. rows: addresses of the lane's 16 bytes of the tile's first panel in the
    warp's rows lane // 8, and 4, 8, 12 further down.
    """
    pack = arithmetic.pack_f16 if dtype == np.float16 else arithmetic.pack_bf16

    @cuda.jit(device=True, forceinline=True)
    def copy(place: Any, address: Any, first: Any, columns: Any) -> None:
        """Stores 16 bytes of shared memory."""
        words, wanted = load_shared_4(place), np.uint32(1) if address != 0 and first < columns else np.uint32(0)
        to = np.uint64(address + np.uint64(2 * first))
        memory.store_once_if_4_u32(to, words[0], words[1], words[2], words[3], wanted)

    def store(z: Any, first: Any, staging: Any, rows: Any, columns: Any, factor: Any) -> Any:
        """By a warp: stores 16 rows of a panel of 64 columns; z: the thread's 32 numbers of it."""
        lane, warp = np.uint32(cuda.threadIdx.x & 31), np.uint32((cuda.threadIdx.x >> 5) & 3)
        staging = np.uint32(staging + warp * _WARP_BYTES)
        # Matrices 0 and 1 are rows 0-7 and 8-15, of eight columns; 2 and 3 are the same of the next eight. A row's 16 bytes
        # number i are at place i ^ (row % 8).
        to = np.uint32(staging + (lane & np.uint32(15)) * _ROW_BYTES)
        to = np.uint32(to + (((lane >> np.uint32(4)) ^ (lane & np.uint32(7))) << np.uint32(4)))
        source = np.uint32(staging + (lane >> np.uint32(3)) * _ROW_BYTES)
        source = np.uint32(source + (((lane & np.uint32(7)) ^ (lane >> np.uint32(3))) << np.uint32(4)))
        cuda.syncwarp()  # all have read what was here before
        store_matrices(
            to, pack(z[0] * factor, z[1] * factor), pack(z[2] * factor, z[3] * factor),
            pack(z[4] * factor, z[5] * factor), pack(z[6] * factor, z[7] * factor),
        )  # fmt: skip
        store_matrices(
            to ^ np.uint32(32), pack(z[8] * factor, z[9] * factor), pack(z[10] * factor, z[11] * factor),
            pack(z[12] * factor, z[13] * factor), pack(z[14] * factor, z[15] * factor),
        )  # fmt: skip
        store_matrices(
            to ^ np.uint32(64), pack(z[16] * factor, z[17] * factor), pack(z[18] * factor, z[19] * factor),
            pack(z[20] * factor, z[21] * factor), pack(z[22] * factor, z[23] * factor),
        )  # fmt: skip
        store_matrices(
            to ^ np.uint32(96), pack(z[24] * factor, z[25] * factor), pack(z[26] * factor, z[27] * factor),
            pack(z[28] * factor, z[29] * factor), pack(z[30] * factor, z[31] * factor),
        )  # fmt: skip
        cuda.syncwarp()
        other = np.uint32(source ^ np.uint32(64))
        copy(source, rows[0], first, columns)
        copy(other + np.uint32(4) * _ROW_BYTES, rows[1], first, columns)
        copy(source + np.uint32(8) * _ROW_BYTES, rows[2], first, columns)
        copy(other + np.uint32(12) * _ROW_BYTES, rows[3], first, columns)
        return np.int32(0)

    return visit_chunks(n, PANEL, store, U32, _FOUR_ROWS, I32, F32)


@functools.cache
def make_finish_rows(n: int, dtype: np.dtype) -> Any:
    """The device function by which a consumer stores a finished tile, or adds it to what a gradient holds."""
    add_rows, store_rows = make_add_rows(n, dtype), make_store_rows(n, dtype)
    store_rows_in_float32 = make_store_rows_in_float32(n)

    @cuda.jit(device=True, forceinline=True)
    def address_of_row(output: Any, row: Any, offset_bytes: Any) -> Any:
        """The address in an `Output`, so many bytes into a row; 0 for row -1, which is nobody's."""
        if row < 0:
            return np.uint64(0)
        return np.uint64(output.address + np.uint64(np.int64(row) * output.pitch_bytes + offset_bytes))

    @cuda.jit(device=True, forceinline=True)
    def two_rows(output: Any, rows: Any, position: Any, offset_bytes: Any) -> Any:
        """Addresses in the rows that a thread's fragment has: rows[position], and 8 further down."""
        return (
            address_of_row(output, rows[position], offset_bytes),
            address_of_row(output, rows[position + 8], offset_bytes),
        )

    @cuda.jit(device=True, forceinline=True)
    def four_rows(output: Any, rows: Any, position: Any, offset_bytes: Any) -> Any:
        """Addresses in the rows that a lane stores 16 bytes of: rows[position], and 4, 8, 12 further down."""
        return (
            address_of_row(output, rows[position], offset_bytes),
            address_of_row(output, rows[position + 4], offset_bytes),
            address_of_row(output, rows[position + 8], offset_bytes),
            address_of_row(output, rows[position + 12], offset_bytes),
        )

    @cuda.jit(device=True, forceinline=True)
    def finish_rows(
        upper: Any, lower: Any, staging: Any, thread: Any, output: Any, place: Any, factor: Any, adds: Any
    ) -> None:  # fmt: skip
        """By a consumer, threads 0 to 127: stores a tile of sums times factor to an `Output`, or adds it.

        upper, lower: fragments of its first and last 64 rows. staging: address of this consumer's. place: the `TilePlace`.
        """
        rows, lane, first = place.rows, np.int32(thread & 31), np.int64(place.first + (thread >> 5) * 16)
        if adds:
            d, position = np.int32(place.d0 + 2 * (lane & 3)), first + (lane >> 2)
            offset, columns = np.int64(d) << (1 + output.is_float32), np.int32(place.D - d)
            upper = add_rows(upper, two_rows(output, rows, position, offset), columns, output.is_float32, factor)
            lower = add_rows(lower, two_rows(output, rows, position + 64, offset), columns, output.is_float32, factor)
            factor = np.float32(1)
        if output.is_float32 != 0:
            d, position = np.int32(place.d0 + 2 * (lane & 3)), first + (lane >> 2)
            offset, columns = np.int64(4 * d), np.int32(place.D - d)
            store_rows_in_float32(upper, two_rows(output, rows, position, offset), columns, factor)
            store_rows_in_float32(lower, two_rows(output, rows, position + 64, offset), columns, factor)
        else:
            d, position = np.int32(place.d0 + 8 * (lane & 7)), first + (lane >> 3)
            offset, columns = np.int64(2 * d), np.int32(place.D - d)
            store_rows(upper, staging, four_rows(output, rows, position, offset), columns, factor)
            store_rows(lower, staging, four_rows(output, rows, position + 64, offset), columns, factor)

    return finish_rows
