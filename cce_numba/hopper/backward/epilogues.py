"""What becomes of a tile of sums in registers: G, a part of dE, or rows of a gradient.

Lanes hold two neighbouring numbers of a row each, and memory wants whole rows. G and finished 16-bit gradients go through
shared memory, 8 KiB of it for each consumer, with the 128-byte swizzle. Sums of dE that are not complete yet need no order that
others know: each thread has its own 16 bytes at a time (`make_store_sums`).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from cce_numba.hopper.backward.tiles import G_BOX, G_ROW_BYTES, PANEL, STAGING_BYTES
from cce_numba.ptx import arithmetic, control, memory
from cce_numba.tensor_core.exponentials import LOG2E
from cce_numba.tensor_core.fragment import change_chunks, visit_chunks

_F32, _I32, _U32, _U64 = types.float32, types.int32, types.uint32, types.uint64
PARTS = 8  # partial sums of a column of G: of 16 tokens each
SUMS_STEP = 16 * 128  # 16 bytes of each thread of a consumer
_ROW_BYTES = np.uint32(2 * PANEL)
_WARP_BYTES = np.uint32(STAGING_BYTES // 4)

exp2, fma = arithmetic.exp2, arithmetic.fma
float_of_bits = arithmetic.float_of_bits
shuffle_xor, barrier_sync = control.shuffle_xor_f32, control.barrier_sync
load_two_i32, load_two_f32 = memory.load_shared_2_i32_freely, memory.load_shared_2_f32_freely
load_if_u32, load_if_4, store_if_4 = memory.load_if_u32, memory.load_if_4_u32, memory.store_if_4_u32
store_if_2_f32, store_f32 = memory.store_if_2_f32, memory.store_global_f32
store_4, add_4, store_once_if_4 = memory.store_4_f32, memory.add_4_f32, memory.store_once_if_4_u32
store_matrices, store_matrices_transposed = memory.store_matrices, memory.store_matrices_transposed
load_shared_4 = memory.load_shared_4_u32


@functools.cache
def make_store_g(n: int, dtype: np.dtype, capped: bool, with_sums: bool, scaled: bool, smoothed: bool) -> Any:
    """Logits become G in the input dtype, stored column by column.

    In a kernel, for 64 tokens: `store_g(z, columns_smem, bias_smem, stored, staging, g, sums, consumer, a_0, shift_0, b_0,
    target_0, scale_0, uniform_0, a_1, shift_1, b_1, target_1, scale_1, uniform_1, softcap, class_weights)` with, for rows 0 and
    1 of the thread: softmax weight, log-sum-exp in base 2, target's weight, target; logit scale, if scaled; uniform weight, if
    smoothed, times that of the class, if class_weights is not 0 but an address. The first two addresses must come out of an
    ordered instruction (see `memory.load_shared_2_i32_freely`). `stored` columns, a multiple of 64, go to g, the address of the
    tile's first column and these tokens. sums is the address of (columns, PARTS) for this tile and this warp's first tokens.

    G_BOX columns at a time are transposed into shared memory, and stored in rows of 128 bytes while the next are computed.
    """
    pack = arithmetic.pack_f16 if dtype == np.float16 else arithmetic.pack_bf16
    box_bytes = np.uint32(G_BOX * 2 * PANEL)

    def gradient(
        z: Any, v: Any, a: Any, shift: Any, b: Any, target: Any, scale: Any, uniform: Any, softcap: Any, class_weight: Any
    ) -> Any:  # fmt: skip
        if scaled:
            z = z * scale
        if capped:
            z = softcap * math.tanh(z / softcap)
        value = a * exp2(fma(z, LOG2E, -shift))
        if v == target:
            value -= b
        if smoothed:
            value -= uniform * class_weight
        if capped:
            value *= np.float32(1) - (z / softcap) * (z / softcap)
        # Nobody's column, or a token that takes no part, not even with a NaN.
        if v < 0 or (a == np.float32(0) and b == np.float32(0) and (not smoothed or uniform == np.float32(0))):
            value = np.float32(0)
        return value

    inlined = cuda.jit(device=True, forceinline=True)(gradient)

    @cuda.jit(device=True, forceinline=True)
    def class_weight_of(v: Any, class_weights: Any) -> Any:
        """1 if there are none."""
        wanted = np.uint32(1) if class_weights != 0 and v >= 0 else np.uint32(0)
        weight = float_of_bits(load_if_u32(np.uint64(class_weights + np.uint64(4 * np.int64(v))), wanted))
        return weight if class_weights != 0 else np.float32(1)

    @cuda.jit(device=True, forceinline=True)
    def store_four(address: Any, words: Any) -> None:
        store_if_4(address, words[0], words[1], words[2], words[3], np.uint32(1))

    @cuda.jit(device=True, forceinline=True)
    def group(
        z_00: Any, z_01: Any, z_10: Any, z_11: Any, column: Any, columns: Any, biases: Any, stored: Any, sums: Any,
        a_0: Any, shift_0: Any, b_0: Any, target_0: Any, scale_0: Any, uniform_0: Any, a_1: Any, shift_1: Any, b_1: Any,
        target_1: Any, scale_1: Any, uniform_1: Any, softcap: Any, class_weights: Any,
    ) -> Any:  # fmt: skip
        """Eight columns from `column` on: two words, of the thread's first and second row."""
        lane = np.int32(cuda.threadIdx.x & 31)
        place = np.uint32(4 * (column + 2 * (lane & 3)))
        v, bias = load_two_i32(columns + place), load_two_f32(biases + place)
        weight_0 = weight_1 = np.float32(1)
        if smoothed:
            weight_0, weight_1 = class_weight_of(v[0], class_weights), class_weight_of(v[1], class_weights)
        g_00 = inlined(z_00 + bias[0], v[0], a_0, shift_0, b_0, target_0, scale_0, uniform_0, softcap, weight_0)
        g_01 = inlined(z_01 + bias[1], v[1], a_0, shift_0, b_0, target_0, scale_0, uniform_0, softcap, weight_1)
        g_10 = inlined(z_10 + bias[0], v[0], a_1, shift_1, b_1, target_1, scale_1, uniform_1, softcap, weight_0)
        g_11 = inlined(z_11 + bias[1], v[1], a_1, shift_1, b_1, target_1, scale_1, uniform_1, softcap, weight_1)
        if with_sums:
            sum_0, sum_1 = g_00 + g_10, g_01 + g_11
            sum_0, sum_1 = sum_0 + shuffle_xor(sum_0, 4), sum_1 + shuffle_xor(sum_1, 4)
            sum_0, sum_1 = sum_0 + shuffle_xor(sum_0, 8), sum_1 + shuffle_xor(sum_1, 8)
            sum_0, sum_1 = sum_0 + shuffle_xor(sum_0, 16), sum_1 + shuffle_xor(sum_1, 16)
            own = np.int32(column + 2 * lane)
            if lane < 4 and own < stored:  # `stored` is even
                store_f32(sums + np.uint64(4 * PARTS * own), sum_0)
                store_f32(sums + np.uint64(4 * PARTS * (own + 1)), sum_1)
        return pack(g_00, g_01), pack(g_10, g_11)

    def store(
        z: Any, first: Any, columns: Any, biases: Any, stored: Any, staging: Any, g: Any, sums: Any, consumer: Any,
        a_0: Any, shift_0: Any, b_0: Any, target_0: Any, scale_0: Any, uniform_0: Any, a_1: Any, shift_1: Any, b_1: Any,
        target_1: Any, scale_1: Any, uniform_1: Any, softcap: Any, class_weights: Any,
    ) -> Any:  # fmt: skip
        if first < stored:
            thread = np.int32(cuda.threadIdx.x & 127)
            lane, warp = np.uint32(thread & 31), np.uint32(thread >> 5)
            # Two boxes: while some still read one, others fill the next.
            box = np.uint32(staging + (np.uint32(first // G_BOX) & np.uint32(1)) * box_bytes)
            # Matrices 0 and 1 are tokens 0-7 and 8-15 of this warp, of eight columns; 2 and 3 of the next eight.
            column = np.uint32((lane & np.uint32(7)) + np.uint32(8) * (lane >> np.uint32(4)))
            sixteen_bytes = np.uint32(np.uint32(2) * warp + ((lane >> np.uint32(3)) & np.uint32(1)))
            swizzled = np.uint32((sixteen_bytes ^ (lane & np.uint32(7))) << np.uint32(4))
            place = np.uint32(box + column * _ROW_BYTES + swizzled)
            word_0, word_1 = group(
                z[0], z[1], z[2], z[3], first, columns, biases, stored, sums,
                a_0, shift_0, b_0, target_0, scale_0, uniform_0, a_1, shift_1, b_1, target_1, scale_1, uniform_1, softcap,
                class_weights,
            )  # fmt: skip
            word_2, word_3 = group(
                z[4], z[5], z[6], z[7], first + 8, columns, biases, stored, sums,
                a_0, shift_0, b_0, target_0, scale_0, uniform_0, a_1, shift_1, b_1, target_1, scale_1, uniform_1, softcap,
                class_weights,
            )  # fmt: skip
            store_matrices_transposed(place, word_0, word_1, word_2, word_3)
            word_0, word_1 = group(
                z[8], z[9], z[10], z[11], first + 16, columns, biases, stored, sums,
                a_0, shift_0, b_0, target_0, scale_0, uniform_0, a_1, shift_1, b_1, target_1, scale_1, uniform_1, softcap,
                class_weights,
            )  # fmt: skip
            word_2, word_3 = group(
                z[12], z[13], z[14], z[15], first + 24, columns, biases, stored, sums,
                a_0, shift_0, b_0, target_0, scale_0, uniform_0, a_1, shift_1, b_1, target_1, scale_1, uniform_1, softcap,
                class_weights,
            )  # fmt: skip
            store_matrices_transposed(place + np.uint32(16) * _ROW_BYTES, word_0, word_1, word_2, word_3)
            barrier_sync(np.uint32(1 + consumer), np.uint32(128))
            column = np.uint32(thread >> 3)
            place = np.uint32(box + column * _ROW_BYTES)
            place = np.uint32(place + (((lane & np.uint32(7)) ^ (column & np.uint32(7))) << np.uint32(4)))
            to = np.uint64(g + np.uint64(G_ROW_BYTES * (first + (thread >> 3)) + 16 * (thread & 7)))
            store_four(to, load_shared_4(place))
            store_four(to + np.uint64(16 * G_ROW_BYTES), load_shared_4(place + np.uint32(16) * _ROW_BYTES))
        return np.int32(0)

    row = (_F32, _F32, _F32, _I32, _F32, _F32)
    return visit_chunks(n, G_BOX, store, _U32, _U32, _I32, _U32, _U64, _U64, _I32, *row, *row, _F32, _U64)


@functools.cache
def make_store_sums(n: int) -> Any:
    """Sums of dE that are not complete: `store_sums(sums, address)`; nobody else reads them, so they stay in threads' order.

    The address is that of the thread's first 16 bytes; a warpgroup's next are `SUMS_STEP` bytes further on.
    """

    def store(z: Any, first: Any, address: Any) -> Any:
        store_4(np.uint64(address + np.uint64(SUMS_STEP // 8 * first)), z[0], z[1], z[2], z[3])
        return np.int32(0)

    return visit_chunks(n, 8, store, _U64)


@functools.cache
def make_add_to_sums(n: int) -> Any:
    """As `make_store_sums`, added to what is there; by one thread at a time, and so in the same order each time."""

    def add(z: Any, first: Any, address: Any) -> Any:
        add_4(np.uint64(address + np.uint64(SUMS_STEP // 8 * first)), z[0], z[1], z[2], z[3])
        return np.int32(0)

    return visit_chunks(n, 8, add, _U64)


@functools.cache
def make_add_sums(n: int) -> Any:
    """`sums = add_sums(sums, address)`: with what `make_store_sums` and `make_add_to_sums` left there."""

    def add(z: Any, first: Any, address: Any) -> Any:
        old = load_if_4(np.uint64(address + np.uint64(SUMS_STEP // 8 * first)), np.uint32(1))
        return (
            z[0] + float_of_bits(old[0]), z[1] + float_of_bits(old[1]),
            z[2] + float_of_bits(old[2]), z[3] + float_of_bits(old[3]),
        )  # fmt: skip

    return change_chunks(n, 8, add, _U64)


@functools.cache
def make_add_rows(n: int, dtype: np.dtype) -> Any:
    """Multiplies by scale, and adds rows of a gradient as they stand.

    In a kernel: `sums = add(sums, row_0, row_1, columns, in_float32, scale)`: addresses of the thread's first number in each
    row, 0 for nobody; columns that are left from there on.
    """
    widen = arithmetic.widen_f16 if dtype == np.float16 else arithmetic.widen_bf16
    eight, sixteen, lower = np.int32(8), np.uint32(16), np.uint32(0xFFFF)

    @cuda.jit(device=True, forceinline=True)
    def plus(x: Any, y: Any, row: Any, column: Any, columns: Any, in_float32: Any, scale: Any) -> Any:
        mine = np.uint32(1) if row != 0 and column < columns else np.uint32(0)
        address = np.uint64(row + (np.uint64(column) << np.uint64(1 + in_float32)))
        first = load_if_u32(address, mine)
        second = load_if_u32(np.uint64(address + np.uint64(4)), np.uint32(mine & np.uint32(in_float32)))
        old_x = float_of_bits(first) if in_float32 != 0 else widen(np.uint32(first & lower))
        old_y = float_of_bits(second) if in_float32 != 0 else widen(np.uint32(first >> sixteen))
        return fma(x, scale, old_x), fma(y, scale, old_y)

    def add(z: Any, first: Any, row_0: Any, row_1: Any, columns: Any, in_float32: Any, scale: Any) -> Any:
        return (
            plus(z[0], z[1], row_0, first, columns, in_float32, scale)
            + plus(z[2], z[3], row_1, first, columns, in_float32, scale)
            + plus(z[4], z[5], row_0, first + eight, columns, in_float32, scale)
            + plus(z[6], z[7], row_1, first + eight, columns, in_float32, scale)
        )

    return change_chunks(n, 16, add, _U64, _U64, _I32, _I32, _F32)


@functools.cache
def make_store_rows(n: int, dtype: np.dtype) -> Any:
    """Rows of a finished gradient of 16 bits, multiplied by scale and rounded; a warp's 16 rows, a panel of columns at a time.

    In a kernel: `store(sums, staging, address_0, address_1, address_2, address_3, columns, scale)`: where the warp's rows
    lane // 8, and 4, 8, 12 further down, have this lane's 16 bytes of the tile's first panel, 0 for nobody; and the columns
    that are left from there on.
    """
    pack = arithmetic.pack_f16 if dtype == np.float16 else arithmetic.pack_bf16

    @cuda.jit(device=True, forceinline=True)
    def copy(place: Any, address: Any, first: Any, columns: Any) -> None:
        words, wanted = load_shared_4(place), np.uint32(1) if address != 0 and first < columns else np.uint32(0)
        store_once_if_4(np.uint64(address + np.uint64(2 * first)), words[0], words[1], words[2], words[3], wanted)

    def store(
        z: Any, first: Any, staging: Any, address_0: Any, address_1: Any, address_2: Any, address_3: Any, columns: Any,
        scale: Any,
    ) -> Any:  # fmt: skip
        lane, warp = np.uint32(cuda.threadIdx.x & 31), np.uint32((cuda.threadIdx.x >> 5) & 3)
        staging = np.uint32(staging + warp * _WARP_BYTES)
        # Matrices 0 and 1 are rows 0-7 and 8-15, of eight columns; 2 and 3 of the next eight. A row's 16 bytes number i are at
        # i ^ (row % 8).
        to = np.uint32(staging + (lane & np.uint32(15)) * _ROW_BYTES)
        to = np.uint32(to + (((lane >> np.uint32(4)) ^ (lane & np.uint32(7))) << np.uint32(4)))
        source = np.uint32(staging + (lane >> np.uint32(3)) * _ROW_BYTES)
        source = np.uint32(source + (((lane & np.uint32(7)) ^ (lane >> np.uint32(3))) << np.uint32(4)))
        cuda.syncwarp()  # all have read what was here before
        store_matrices(
            to, pack(z[0] * scale, z[1] * scale), pack(z[2] * scale, z[3] * scale),
            pack(z[4] * scale, z[5] * scale), pack(z[6] * scale, z[7] * scale),
        )  # fmt: skip
        store_matrices(
            to ^ np.uint32(32), pack(z[8] * scale, z[9] * scale), pack(z[10] * scale, z[11] * scale),
            pack(z[12] * scale, z[13] * scale), pack(z[14] * scale, z[15] * scale),
        )  # fmt: skip
        store_matrices(
            to ^ np.uint32(64), pack(z[16] * scale, z[17] * scale), pack(z[18] * scale, z[19] * scale),
            pack(z[20] * scale, z[21] * scale), pack(z[22] * scale, z[23] * scale),
        )  # fmt: skip
        store_matrices(
            to ^ np.uint32(96), pack(z[24] * scale, z[25] * scale), pack(z[26] * scale, z[27] * scale),
            pack(z[28] * scale, z[29] * scale), pack(z[30] * scale, z[31] * scale),
        )  # fmt: skip
        cuda.syncwarp()
        other = np.uint32(source ^ np.uint32(64))
        copy(source, address_0, first, columns)
        copy(other + np.uint32(4) * _ROW_BYTES, address_1, first, columns)
        copy(source + np.uint32(8) * _ROW_BYTES, address_2, first, columns)
        copy(other + np.uint32(12) * _ROW_BYTES, address_3, first, columns)
        return np.int32(0)

    return visit_chunks(n, PANEL, store, _U32, _U64, _U64, _U64, _U64, _I32, _F32)


@functools.cache
def make_store_rows_in_float32(n: int) -> Any:
    """Rows of a finished gradient in float32: `store(sums, row_0, row_1, columns, scale)`; addresses as in `make_add_rows`."""

    @cuda.jit(device=True, forceinline=True)
    def store_two(row: Any, x: Any, y: Any, first: Any, columns: Any) -> None:
        wanted = np.uint32(1) if row != 0 and first < columns else np.uint32(0)
        store_if_2_f32(np.uint64(row + np.uint64(4 * first)), x, y, wanted)

    def store(z: Any, first: Any, row_0: Any, row_1: Any, columns: Any, scale: Any) -> Any:
        store_two(row_0, z[0] * scale, z[1] * scale, first, columns)
        store_two(row_1, z[2] * scale, z[3] * scale, first, columns)
        return np.int32(0)

    return visit_chunks(n, 8, store, _U64, _U64, _I32, _F32)
