"""A warp's part of a product: 64 rows by n columns, 16 terms at a time, with operands that lie in a stage of shared memory.

A stage has rows of 128 bytes, 64 16-bit numbers each, whose 16 bytes number i lie at place i ^ (row % 8): the swizzle, by which
eight rows' 16 bytes are in different banks. An operand lies there in one of two ways:

    along K       a row for each of its M or N indices; the 64 terms are within the row
    across K      panels of 64 M or N indices, one after the other, `PANEL_BYTES` each; a panel has a row for each of 64 terms.
                  Loads transpose it

So the address of a lane's 16 bytes moves by an exclusive or within rows, and by a sum from row to row.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from llvmlite import ir
from numba import cuda
from numba.cuda import types

from cce_numba.ampere.tiles import ROW_BYTES, SLABS
from cce_numba.ptx.fragment import fragment_type
from cce_numba.ptx.instruction import U32, as_intrinsic, check_operands
from cce_numba.ptx.mma import emit_load, emit_mma

PANEL_BYTES = 64 * ROW_BYTES
STEPS = 4  # of 16 terms, in a stage
_STEP_BYTES = 32  # of 16 terms within a row, as of 16 columns across K
_ROWS_BYTES = 16 * ROW_BYTES  # of 16 rows


def operands_type(n: int) -> Any:
    """The numba type of a lane's operands of 16 terms: four words of A for each slab, two of B for each eight columns."""
    return types.UniTuple(U32, 4 * SLABS + n // 4)


def sums_type(n: int) -> Any:
    """The numba type of a lane's sums: a fragment of n columns for each slab."""
    return types.UniTuple(fragment_type(n), SLABS)


@functools.cache
def make_a_address(across: bool) -> Any:
    """`address = a_address(lane, warp_row)`: of the lane's 16 bytes of A for the warp's first slab, in a stage at address 0."""
    across_k = across

    @cuda.jit(device=True, forceinline=True)
    def a_address(lane: Any, warp_row: Any) -> Any:
        """warp_row: 0 for rows 0 to 63 of the tile, 1 for the others."""
        # Matrices 0 and 1 are rows 0-7 and 8-15 of the slab, of the first eight terms; 2 and 3 the same of the next eight.
        in_eight, eight, sixteen = np.uint32(lane & 7), np.uint32((lane >> 3) & 1), np.uint32(lane >> 4)
        if across_k:
            row, part = np.uint32(in_eight + np.uint32(8) * sixteen), eight
        else:
            row, part = np.uint32(in_eight + np.uint32(8) * eight), sixteen
        swizzled = np.uint32((part ^ in_eight) << np.uint32(4))
        return np.uint32(np.uint32(warp_row) * np.uint32(PANEL_BYTES) + row * np.uint32(ROW_BYTES) + swizzled)

    return a_address


@functools.cache
def make_b_address(n: int, across: bool) -> Any:
    """`address = b_address(lane, warp_column, pair)`: of the lane's 16 bytes of B for a pair of eight columns of the warp's n.

    In a B that begins at address 0.
    """
    across_k, pair_rows, pair_parts = across, np.uint32(n), np.uint32(n // 8)

    @cuda.jit(device=True, forceinline=True)
    def b_address(lane: Any, warp_column: Any, pair: Any) -> Any:
        """warp_column: 0 to 3. pair: the number of the pair."""
        # Matrices 0 and 1 are the first and the next eight terms of eight columns; 2 and 3 the same of the next eight columns.
        in_eight, eight, sixteen = np.uint32(lane & 7), np.uint32((lane >> 3) & 1), np.uint32(lane >> 4)
        if across_k:
            part = np.uint32(np.uint32(warp_column) * pair_parts + np.uint32(2 * pair) + sixteen)
            panel, part = np.uint32(part >> np.uint32(3)), np.uint32(part & np.uint32(7))
            row = np.uint32(np.uint32(64) * panel + in_eight + np.uint32(8) * eight)
        else:
            row = np.uint32(np.uint32(warp_column) * pair_rows + np.uint32(16 * pair) + in_eight + np.uint32(8) * sixteen)
            part = eight
        swizzled = np.uint32((part ^ in_eight) << np.uint32(4))
        return np.uint32(row * np.uint32(ROW_BYTES) + swizzled)

    return b_address


def moves(index: int, step: int, across: bool) -> tuple[int, int]:
    """What a lane's address of the first 16 terms and indices is combined with, by exclusive or, and then increased by.

    So it becomes that of the step-th 16 terms, and of the index-th 16 indices (M or N).
    """
    within_row, rows = (index, step) if across else (step, index)
    return _STEP_BYTES * within_row, _ROWS_BYTES * rows


@functools.cache
def make_load_operands(n: int, step: int, a_across: bool, b_across: bool) -> Any:
    """`operands = load_operands(a, b)`: the operands of the step-th 16 terms of a stage.

    a: the lane's address for its first slab. b: a tuple of its addresses for each pair of eight columns.
    """
    pairs = n // 16
    addresses = types.UniTuple(U32, pairs)
    result = operands_type(n)

    def define(_: Any, *given: Any) -> Any:
        check_operands("load_operands", (U32, addresses), given)

        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            def moved(address: Any, index: int, across: bool) -> Any:
                within_row, by_rows = moves(index, step, across)
                if within_row:
                    address = builder.xor(address, ir.Constant(ir.IntType(32), within_row))
                if by_rows:
                    address = builder.add(address, ir.Constant(ir.IntType(32), by_rows))
                return address

            words = []
            for slab in range(SLABS):
                words += emit_load(builder, moved(values[0], slab, a_across), transposed=a_across)
            for pair in range(pairs):
                address = moved(builder.extract_value(values[1], pair), 0, b_across)
                words += emit_load(builder, address, transposed=b_across)
            return context.make_tuple(builder, result, words)

        return result(U32, addresses), generate

    return as_intrinsic(define, 2, f"load_operands_{n}")


@functools.cache
def make_multiply(n: int, dtype: str) -> Any:
    """`sums = multiply(sums, operands)`: adds the products of 16 terms of "bf16" or "f16" operands, by a warp."""
    sums, operands = sums_type(n), operands_type(n)

    def define(_: Any, *given: Any) -> Any:
        check_operands("multiply", (sums, operands), given)

        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            slabs = [builder.extract_value(values[0], slab) for slab in range(SLABS)]
            words = [builder.extract_value(values[1], i) for i in range(4 * SLABS + n // 4)]
            for j in range(n // 8):
                b = words[4 * SLABS + 2 * j : 4 * SLABS + 2 * j + 2]
                for slab in range(SLABS):
                    a, places = words[4 * slab : 4 * slab + 4], range(4 * j, 4 * j + 4)
                    old = [builder.extract_value(slabs[slab], i) for i in places]
                    for i, new in zip(places, emit_mma(builder, dtype, a, b, old), strict=True):
                        slabs[slab] = builder.insert_value(slabs[slab], new, i)
            result = values[0]
            for slab in range(SLABS):
                result = builder.insert_value(result, slabs[slab], slab)
            return result

        return sums(sums, operands), generate

    return as_intrinsic(define, 2, f"multiply_{n}")
