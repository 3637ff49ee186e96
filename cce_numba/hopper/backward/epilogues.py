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
PARTS = 8  # partial sums of a column of G: of 16 tokens each

exp2, fma = arithmetic.exp2, arithmetic.fma
float_of_bits, bits_of_float = arithmetic.float_of_bits, arithmetic.bits_of_float
transpose_8x8, shuffle_xor = control.transpose_8x8, control.shuffle_xor_f32
load_i32, load_f32 = memory.load_shared_i32_freely, memory.load_shared_f32_freely
load_if_u32, store_if_u32, store_f32 = memory.load_if_u32, memory.store_if_u32, memory.store_global_f32


@functools.cache
def make_store_g(n: int, dtype: np.dtype, has_bias: bool, capped: bool, with_sums: bool) -> Any:
    """Logits become G in the input dtype, stored column by column.

    In a kernel: `store_g(z, columns_smem, bias_smem, stored, g, sums, a_0, shift_0, b_0, target_0, a_1, shift_1, b_1, target_1,
    softcap)` for rows 0 and 1 of the thread: softmax weight, log-sum-exp in base 2, target's weight, target. The first two must
    come out of an ordered instruction (see `memory.load_shared_i32_freely`). The addresses g and sums are those of the tile's first column and of this warp's first token; sums (columns, PARTS) takes each column's sum.
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
        if has_bias:
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
def make_load_d_e(n: int, dtype: np.dtype, in_float32: bool) -> Any:
    """Rows of dE as they stand, for products to add to: `load(d, row_0, row_1, rest, scale, D, is_first)`.

    row_0, row_1: addresses of the thread's rows, 0 for nobody's; all is multiplied by scale. Where dE itself is of 16 bits it
    holds the upper half of each float32 between rounds; the lower half is at the same place in a workspace, `rest` bytes further
    on. So sums lose nothing, and take half the memory of float32 beside dE.
    """
    is_float16, widen_f16 = dtype == np.float16, arithmetic.widen_f16
    sixteen, upper_half, lower_half = np.uint32(16), np.uint32(0xFFFF0000), np.uint32(0xFFFF)

    def pair(row: Any, d: Any, rest: Any, scale: Any, D: Any, is_first: Any) -> Any:
        mine = np.uint32(1) if row != 0 and d < D else np.uint32(0)
        if in_float32:
            address = np.uint64(row + np.uint64(4 * d))
            x, y = load_if_u32(address, mine), load_if_u32(address + np.uint64(4), mine)
            return float_of_bits(x) * scale, float_of_bits(y) * scale
        address = np.uint64(row + np.uint64(2 * d))
        # At first there is no lower half; a bfloat16 is a float32 without one. No branch, so that all loads go out together.
        upper = load_if_u32(address, mine)
        lower = load_if_u32(address + rest, np.uint32(0) if is_first != 0 else mine)
        x = float_of_bits(np.uint32((upper << sixteen) | (lower & lower_half)))
        y = float_of_bits(np.uint32((upper & upper_half) | (lower >> sixteen)))
        if is_float16 and is_first != 0:
            x, y = widen_f16(np.uint32(upper & lower_half)), widen_f16(np.uint32(upper >> sixteen))
        return x * scale, y * scale

    return fill_pairs(n, pair, _U64, _F32, _I32, _I32)


@functools.cache
def make_store_d_e(n: int, dtype: np.dtype, in_float32: bool) -> Any:
    """Back to where `make_load_d_e` took them: `store(sums, d, row_0, row_1, rest, scale, D, is_last)`; at last rounded, once."""
    pack = arithmetic.pack_f16 if dtype == np.float16 else arithmetic.pack_bf16
    sixteen, upper_half, lower_half = np.uint32(16), np.uint32(0xFFFF0000), np.uint32(0xFFFF)

    def store(x: Any, y: Any, row: Any, d: Any, rest: Any, scale: Any, D: Any, is_last: Any) -> Any:
        mine = np.uint32(1) if row != 0 and d < D else np.uint32(0)
        x, y = x * scale, y * scale
        if in_float32:
            address = np.uint64(row + np.uint64(4 * d))
            store_if_u32(address, bits_of_float(x), mine)
            store_if_u32(address + np.uint64(4), bits_of_float(y), mine)
        else:
            address = np.uint64(row + np.uint64(2 * d))
            bits_x, bits_y = np.uint32(bits_of_float(x)), np.uint32(bits_of_float(y))
            if is_last != 0:
                store_if_u32(address, pack(x, y), mine)
            else:
                store_if_u32(address, np.uint32((bits_x >> sixteen) | (bits_y & upper_half)), mine)
                store_if_u32(address + rest, np.uint32((bits_x & lower_half) | (bits_y << sixteen)), mine)
        return np.int32(0)

    return visit_pairs(n, store, _U64, _F32, _I32, _I32)


@functools.cache
def make_load_d_c(n: int, dtype: np.dtype, in_float32: bool) -> Any:
    """Rows of dC as they stand if they are to be added to, else zeros: `load(d, row_0, row_1, scale, D, accumulate)`."""
    widen = arithmetic.widen_f16 if dtype == np.float16 else arithmetic.widen_bf16

    def pair(row: Any, d: Any, scale: Any, D: Any, accumulate: Any) -> Any:
        # Not zeros in one branch and loads in another: products could then not follow each other without waiting.
        mine = np.uint32(1) if row != 0 and d < D and accumulate != 0 else np.uint32(0)
        if in_float32:
            address = np.uint64(row + np.uint64(4 * d))
            x, y = load_if_u32(address, mine), load_if_u32(address + np.uint64(4), mine)
            return float_of_bits(x) * scale, float_of_bits(y) * scale
        both = load_if_u32(row + np.uint64(2 * d), mine)
        return widen(np.uint32(both & np.uint32(0xFFFF))) * scale, widen(np.uint32(both >> np.uint32(16))) * scale

    return fill_pairs(n, pair, _F32, _I32, _I32)


@functools.cache
def make_store_d_c(n: int, dtype: np.dtype, in_float32: bool) -> Any:
    """Rows of dC, complete: `store(sums, d, row_0, row_1, scale, D)`."""
    pack = arithmetic.pack_f16 if dtype == np.float16 else arithmetic.pack_bf16

    def store(x: Any, y: Any, row: Any, d: Any, scale: Any, D: Any) -> Any:
        mine = np.uint32(1) if row != 0 and d < D else np.uint32(0)
        x, y = x * scale, y * scale
        if in_float32:
            address = np.uint64(row + np.uint64(4 * d))
            store_if_u32(address, bits_of_float(x), mine)
            store_if_u32(address + np.uint64(4), bits_of_float(y), mine)
        else:
            store_if_u32(row + np.uint64(2 * d), pack(x, y), mine)
        return np.int32(0)

    return visit_pairs(n, store, _F32, _I32)
