"""What a tile of sums in registers begins with, and what becomes of it: G, a part of dE, or dC."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from cce_numba.hopper.backward.load import G_ROW_BYTES
from cce_numba.hopper.fold import LOG2E
from cce_numba.hopper.fragment import fill_pairs, visit_groups, visit_pairs
from cce_numba.ptx import arithmetic, control, memory

_F32, _I32, _U32, _U64 = types.float32, types.int32, types.uint32, types.uint64
SIXTEEN, UPPER, LOWER = np.uint32(16), np.uint32(0xFFFF0000), np.uint32(0xFFFF)
PARTS = 8  # partial sums of a column of G: of 16 tokens each

exp2, fma = arithmetic.exp2, arithmetic.fma
float_of_bits, bits_of_float = arithmetic.float_of_bits, arithmetic.bits_of_float
transpose_8x8, shuffle_xor = control.transpose_8x8, control.shuffle_xor_f32
load_i32, load_f32 = memory.load_shared_i32_freely, memory.load_shared_f32_freely
load_if_u32, store_if_u32, store_f32 = memory.load_if_u32, memory.store_if_u32, memory.store_global_f32


@functools.cache
def make_store_g(n: int, dtype: np.dtype, capped: bool, with_sums: bool) -> Any:
    """Logits become G in the input dtype, stored column by column.

    In a kernel: `store_g(z, columns_smem, bias_smem, stored, g, sums, a_0, shift_0, b_0, target_0, a_1, shift_1, b_1, target_1,
    softcap)` for rows 0 and 1 of the thread: softmax weight, log-sum-exp in base 2, target's weight, target. The first two
    addresses must come out of an ordered instruction (see `memory.load_shared_i32_freely`). The addresses g and sums are those
    of the tile's first column and of this warp's first token; sums (columns, PARTS) takes each column's sum.
    """
    pack = arithmetic.pack_f16 if dtype == np.float16 else arithmetic.pack_bf16

    def gradient(z: Any, v: Any, a: Any, shift: Any, b: Any, target: Any, softcap: Any) -> Any:
        if capped:
            z = softcap * math.tanh(z / softcap)
        value = a * exp2(fma(z, LOG2E, -shift))
        if v == target:
            value -= b
        if capped:
            value *= np.float32(1) - (z / softcap) * (z / softcap)
        # Nobody's column, or a token that takes no part, not even with a NaN.
        if v < 0 or (a == np.float32(0) and b == np.float32(0)):
            value = np.float32(0)
        return value

    inlined = cuda.jit(device=True, forceinline=True)(gradient)

    def store(
        z_00: Any, z_01: Any, z_10: Any, z_11: Any, group: Any, columns: Any, biases: Any, stored: Any, g: Any, sums: Any,
        a_0: Any, shift_0: Any, b_0: Any, target_0: Any, a_1: Any, shift_1: Any, b_1: Any, target_1: Any, softcap: Any,
    ) -> Any:  # fmt: skip
        lane = np.int32(cuda.threadIdx.x & 31)
        place = np.uint32(4 * (8 * group + 2 * (lane & 3)))
        v_0, v_1 = np.int32(load_i32(columns + place)), np.int32(load_i32(columns + place + np.uint32(4)))
        bias_0, bias_1 = load_f32(biases + place), load_f32(biases + place + np.uint32(4))
        z_00, z_10, z_01, z_11 = z_00 + bias_0, z_10 + bias_0, z_01 + bias_1, z_11 + bias_1
        g_00 = inlined(z_00, v_0, a_0, shift_0, b_0, target_0, softcap)
        g_01 = inlined(z_01, v_1, a_0, shift_0, b_0, target_0, softcap)
        g_10 = inlined(z_10, v_0, a_1, shift_1, b_1, target_1, softcap)
        g_11 = inlined(z_11, v_1, a_1, shift_1, b_1, target_1, softcap)
        # Now this lane has two tokens of column lane // 4 instead of two columns of token lane // 4.
        upper, lower = transpose_8x8(pack(g_00, g_01)), transpose_8x8(pack(g_10, g_11))
        column = np.int32(8 * group + (lane >> 2))
        mine = np.uint32(1) if column < stored else np.uint32(0)
        address = np.uint64(g + np.uint64(column * G_ROW_BYTES + 4 * (lane & 3)))
        store_if_u32(address, upper, mine)
        store_if_u32(address + np.uint64(16), lower, mine)
        if with_sums:
            sum_0, sum_1 = g_00 + g_10, g_01 + g_11
            sum_0, sum_1 = sum_0 + shuffle_xor(sum_0, 4), sum_1 + shuffle_xor(sum_1, 4)
            sum_0, sum_1 = sum_0 + shuffle_xor(sum_0, 8), sum_1 + shuffle_xor(sum_1, 8)
            sum_0, sum_1 = sum_0 + shuffle_xor(sum_0, 16), sum_1 + shuffle_xor(sum_1, 16)
            column = np.int32(8 * group + 2 * lane)
            if lane < 4 and column < stored:  # `stored` is even
                store_f32(sums + np.uint64(4 * PARTS * column), sum_0)
                store_f32(sums + np.uint64(4 * PARTS * (column + 1)), sum_1)
        return np.int32(0)

    rows = (_F32, _F32, _F32, _I32)
    return visit_groups(n, store, _U32, _U32, _I32, _U64, _U64, *rows, *rows, _F32)


@functools.cache
def make_load_rows(n: int, dtype: np.dtype) -> Any:
    """Rows of a gradient as they stand, for products to add to.

    In a kernel: `load(d, row_0, row_1, in_float32, rest, scale, D, is_split, wanted)`: addresses of the thread's rows, 0 for
    nobody's; all is multiplied by scale, and zero if it is not wanted.

    A gradient of 16 bits that is not complete yet is split: it holds the upper half of each float32, and the lower half is at
    the same place in a workspace, `rest` bytes further on. So sums lose nothing, and take half the memory of float32 beside it.
    """
    is_float16, widen_f16 = dtype == np.float16, arithmetic.widen_f16

    def pair(
        row: Any, d: Any, in_float32: Any, rest: Any, scale: Any, D: Any, is_split: Any, wanted: Any
    ) -> Any:  # fmt: skip
        # No branches, so that all loads go out together.
        mine = np.uint32(1) if row != 0 and d < D and wanted != 0 else np.uint32(0)
        address = np.uint64(row + (np.uint64(d) << np.uint64(1 + in_float32)))
        first = load_if_u32(address, mine)
        has_second = np.uint32(mine & np.uint32(in_float32 | is_split))
        second = load_if_u32(np.uint64(address + (np.uint64(4) if in_float32 != 0 else rest)), has_second)
        # A bfloat16 is a float32 whose lower half is zero.
        x, y = joined(first << SIXTEEN, second), joined(first, second >> SIXTEEN)
        if is_float16:
            whole_x, whole_y = widen_f16(np.uint32(first & LOWER)), widen_f16(np.uint32(first >> SIXTEEN))
            x, y = x if is_split != 0 else whole_x, y if is_split != 0 else whole_y
        x = float_of_bits(first) if in_float32 != 0 else x
        y = float_of_bits(second) if in_float32 != 0 else y
        return x * scale, y * scale

    return fill_pairs(n, pair, _I32, _U64, _F32, _I32, _I32, _I32)


@functools.cache
def make_store_rows(n: int, dtype: np.dtype) -> Any:
    """Back to where `make_load_rows` finds them, rounded if they are not to be split, which is when they are complete.

    In a kernel: `store(sums, d, row_0, row_1, in_float32, rest, scale, D, is_split)`.
    """
    pack = arithmetic.pack_f16 if dtype == np.float16 else arithmetic.pack_bf16

    def store(x: Any, y: Any, row: Any, d: Any, in_float32: Any, rest: Any, scale: Any, D: Any, is_split: Any) -> Any:
        mine = np.uint32(1) if row != 0 and d < D else np.uint32(0)
        x, y = x * scale, y * scale
        bits_x, bits_y = np.uint32(bits_of_float(x)), np.uint32(bits_of_float(y))
        upper, rounded = np.uint32((bits_x >> SIXTEEN) | (bits_y & UPPER)), np.uint32(pack(x, y))
        upper = upper if is_split != 0 else rounded
        lower = np.uint32((bits_x & LOWER) | (bits_y << SIXTEEN))
        address = np.uint64(row + (np.uint64(d) << np.uint64(1 + in_float32)))
        store_if_u32(address, bits_x if in_float32 != 0 else upper, mine)
        address = np.uint64(address + (np.uint64(4) if in_float32 != 0 else rest))
        store_if_u32(address, bits_y if in_float32 != 0 else lower, np.uint32(mine & np.uint32(in_float32 | is_split)))
        return np.int32(0)

    return visit_pairs(n, store, _I32, _U64, _F32, _I32, _I32)


@cuda.jit(device=True, forceinline=True)
def joined(upper: Any, lower: Any) -> Any:
    """The float32 of these halves: the upper one's upper bits, the lower one's lower bits."""
    return float_of_bits(np.uint32((np.uint32(upper) & UPPER) | (np.uint32(lower) & LOWER)))
