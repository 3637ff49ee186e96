"""A warp's part of a product: 64 rows by n columns, a step at a time, with operands that lie in a stage of shared memory.

A step is 16 terms of 16-bit numbers, or 8 of 32-bit ones (`elements`): 32 bytes of each row. A stage has four steps, and rows
of 128 bytes, whose 16 bytes number i lie at place i ^ (row % 8): the swizzle, by which eight rows' 16 bytes are in different
banks. An operand lies there in one of two ways:

    along K       a row for each of its M or N indices; the terms are within the row
    across K      panels of 64 (32) M or N indices, one after the other; a panel has a row for each term. Loads transpose it

So the address of a lane's 16 bytes moves by an exclusive or within rows, and by a sum from row to row. 32-bit numbers that lie
across K are loaded one by one, since `ldmatrix` would not transpose them. A lane loads its terms number t and t + 4 of a step,
t = lane % 4, from the rows 2 * t and 2 * t + 1, so that all lanes read from different banks. Whoever fills the stage puts the
terms there (`row_of_term`), unless both operands lie across K: then their order does not matter.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
from llvmlite import ir
from numba import cuda
from numba.cuda import types

from cce_numba.ampere.tiles import ROW_BYTES, SLABS
from cce_numba.ptx.fragment import fragment_type
from cce_numba.ptx.instruction import U32, as_intrinsic, check_operands
from cce_numba.ptx.mma import emit_load, emit_load_word, emit_mma, emit_round_to_tf32

PANEL_BYTES = 64 * ROW_BYTES  # of 16-bit numbers; two panels of 32-bit ones, which also have 64 indices
STEPS = 4  # in a stage
_STEP_BYTES = 32  # of a step within a row, as of 16 columns across K
_ROWS_BYTES = 16 * ROW_BYTES  # of 16 rows
# Of 32-bit numbers across K: panels of 32 indices, steps of 8 rows; 8 indices are 32 bytes.
_WIDE_PANEL_BYTES, _WIDE_STEP_BYTES, _EIGHT_BYTES, _NEXT_ROW_FLIPS = 32 * ROW_BYTES, 8 * ROW_BYTES, 32, 16


_TF32_UNIT = 2**13  # of the last bit of a tf32 number among the bits of a float32
_LARGEST_BITS, _ONE_BITS, _SIGN_BIT = 0x7F7FFFFF, 0x3F800000, 2**31  # of the largest float32, of 1, of a negative number


def row_of_term(term: int) -> int:
    """In which row of a panel the term of that number lies, of 32-bit numbers across K beside others along K.

    >>> [row_of_term(term) for term in range(10)]
    [0, 2, 4, 6, 1, 3, 5, 7, 8, 10]
    """
    return term // 8 * 8 + 2 * (term % 4) + term // 4 % 2


def term_of_row(row: Any) -> Any:
    """The inverse of `row_of_term`; kernels compile it as well."""
    return (row & ~7) + (row >> 1 & 3) + 4 * (row & 1)


def operands_type(n: int) -> Any:
    """The numba type of a lane's operands of a step: four words of A for each slab, two of B for each eight columns."""
    return types.UniTuple(U32, 4 * SLABS + n // 4)


def sums_type(n: int) -> Any:
    """The numba type of a lane's sums: a fragment of n columns for each slab."""
    return types.UniTuple(fragment_type(n), SLABS)


@cuda.jit(device=True, forceinline=True)
def own_word(lane: Any, part: Any) -> Any:
    """Where a lane's 32-bit number of the first step is, in a panel across K. part: of the eight indices' first 16 bytes."""
    index, row = np.uint32(lane >> 2), np.uint32(2 * (lane & 3))
    swizzled = np.uint32(((part + (index >> np.uint32(2))) ^ row) << np.uint32(4))
    return np.uint32(row * np.uint32(ROW_BYTES) + swizzled + np.uint32(4) * (index & np.uint32(3)))


@functools.cache
def make_a_address(across: bool, wide: bool = False) -> Any:
    """`address = a_address(lane, warp_row)`: of the lane's 16 bytes of A for the warp's first slab, in a stage at address 0.

    wide: of 32-bit numbers. Across K these are the lane's 4 bytes.
    """
    across_k, one_by_one = across, across and wide

    @cuda.jit(device=True, forceinline=True)
    def a_address(lane: Any, warp_row: Any) -> Any:
        """warp_row: 0 for rows 0 to 63 of the tile, 1 for the others."""
        if one_by_one:
            return np.uint32(np.uint32(warp_row) * np.uint32(PANEL_BYTES) + own_word(lane, np.uint32(0)))
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
def make_b_address(n: int, across: bool, wide: bool = False) -> Any:
    """`address = b_address(lane, warp_column, pair)`: of the lane's 16 bytes of B for a pair of eight columns of the warp's n.

    In a B that begins at address 0. wide: as in `make_a_address`.
    """
    across_k, pair_rows, pair_parts, one_by_one = across, np.uint32(n), np.uint32(n // 8), across and wide

    @cuda.jit(device=True, forceinline=True)
    def b_address(lane: Any, warp_column: Any, pair: Any) -> Any:
        """warp_column: 0 to 3. pair: the number of the pair."""
        if one_by_one:
            column = np.uint32(np.uint32(warp_column) * pair_rows + np.uint32(16 * pair))
            part = np.uint32((column & np.uint32(31)) >> np.uint32(2))
            return np.uint32((column >> np.uint32(5)) * np.uint32(_WIDE_PANEL_BYTES) + own_word(lane, part))
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
    """What a lane's address of the first step and 16 indices is combined with, by exclusive or, and then increased by.

    So it becomes that of the step, and of the index-th 16 indices (M or N).
    """
    within_row, rows = (index, step) if across else (step, index)
    return _STEP_BYTES * within_row, _ROWS_BYTES * rows


def wide_moves(index: int, step: int, eight: int, next_term: int) -> tuple[int, int]:
    """The same for one number of 32-bit numbers across K: of the index-th 16 indices, their first or second eight (`eight`).

    next_term: 0 for the lane's first term, 1 for that four further on.
    """
    panel, within_row = divmod(2 * _EIGHT_BYTES * index, ROW_BYTES)
    flips = within_row ^ (_EIGHT_BYTES * eight) ^ (_NEXT_ROW_FLIPS * next_term)
    return flips, _WIDE_PANEL_BYTES * panel + _WIDE_STEP_BYTES * step + ROW_BYTES * next_term


@functools.cache
def make_load_operands(n: int, step: int, a_across: bool, b_across: bool, wide: bool = False) -> Any:
    """`operands = load_operands(a, b)`: the operands of a step of a stage.

    a: the lane's address for its first slab. b: a tuple of its addresses for each pair of eight columns. wide: numbers have 32
    bits.
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

            def one(address: Any, index: int, eight: int, next_term: int) -> Any:
                flips, adds = wide_moves(index, step, eight, next_term)
                if flips:
                    address = builder.xor(address, ir.Constant(ir.IntType(32), flips))
                return emit_load_word(builder, address, adds)

            words = []
            for slab in range(SLABS):
                if a_across and wide:
                    words += [one(values[0], slab, word & 1, word >> 1) for word in range(4)]
                else:
                    words += emit_load(builder, moved(values[0], slab, a_across), transposed=a_across)
            for pair in range(pairs):
                address = builder.extract_value(values[1], pair)
                if b_across and wide:
                    words += [one(address, 0, word >> 1, word & 1) for word in range(4)]
                else:
                    words += emit_load(builder, moved(address, 0, b_across), transposed=b_across)
            return context.make_tuple(builder, result, words)

        return result(U32, addresses), generate

    return as_intrinsic(define, 2, f"load_operands_{n}")


@functools.cache
def make_hold_back(n: int) -> Any:
    """`operands = hold_back(operands, mask)`: the same, for products that are not to be moved up before `mask` is there.

    mask: all bits. A word of each slab is combined with it, and all products of a slab need that word.
    """
    operands = operands_type(n)

    def define(_: Any, *given: Any) -> Any:
        check_operands("hold_back", (operands, U32), given)

        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            result = values[0]
            for slab in range(SLABS):
                word = builder.and_(builder.extract_value(result, 4 * slab), values[1])
                result = builder.insert_value(result, word, 4 * slab)
            return result

        return operands(operands, U32), generate

    return as_intrinsic(define, 2, f"hold_back_{n}")


@functools.cache
def make_multiply(n: int, name: str) -> Any:
    """`sums = multiply(sums, operands)`: adds the products of a step, by a warp. name: as in `elements.Elements`."""
    sums, operands = sums_type(n), operands_type(n)
    add_products = {"tf32": _add_rounded, "f32": _add_split}.get(name, functools.partial(_add_products, name))

    def define(_: Any, *given: Any) -> Any:
        check_operands("multiply", (sums, operands), given)

        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            slabs = [builder.extract_value(values[0], slab) for slab in range(SLABS)]
            words = [builder.extract_value(values[1], i) for i in range(4 * SLABS + n // 4)]
            a = [words[4 * slab : 4 * slab + 4] for slab in range(SLABS)]
            b = [words[4 * SLABS + 2 * j : 4 * SLABS + 2 * j + 2] for j in range(n // 8)]
            for j, slab, new in add_products(builder, slabs, a, b):
                for i in range(4):
                    slabs[slab] = builder.insert_value(slabs[slab], new[i], 4 * j + i)
            result = values[0]
            for slab in range(SLABS):
                result = builder.insert_value(result, slabs[slab], slab)
            return result

        return sums(sums, operands), generate

    return as_intrinsic(define, 2, f"multiply_{n}")


# What follows yields `(j, slab, sums)`: the four sums of the j-th eight columns of a slab, with the products. slabs: fragments.
# a, b: words of each slab and of each eight columns. LLVM values all.

_Sums = Iterator[tuple[int, int, list[Any]]]


def _old(builder: Any, slab: Any, j: int) -> list[Any]:
    return [builder.extract_value(slab, i) for i in range(4 * j, 4 * j + 4)]


def _add_products(dtype: str, builder: Any, slabs: list[Any], a: list[Any], b: list[Any]) -> _Sums:
    for j in range(len(b)):
        for slab in range(SLABS):
            yield j, slab, emit_mma(builder, dtype, a[slab], b[j], _old(builder, slabs[slab], j))


def _add_rounded(builder: Any, slabs: list[Any], a: list[Any], b: list[Any]) -> _Sums:
    a, b = ([[emit_round_to_tf32(builder, word) for word in words] for words in operand] for operand in (a, b))
    return _add_products("tf32", builder, slabs, a, b)


def _add_split(builder: Any, slabs: list[Any], a: list[Any], b: list[Any]) -> _Sums:
    """Of products of the parts, the small ones come first. What two low parts give is below half a unit in the last place."""
    a_high, a_low = zip(*(_split(builder, words) for words in a), strict=True)
    zeros = [ir.Constant(ir.FloatType(), 0.0)] * 4
    for j in range(len(b)):
        b_high, b_low = _split(builder, b[j])
        # The slabs' products take turns, since each instruction waits for the one before with the same sums.
        found = [zeros] * SLABS
        for x, y in ((a_low, b_high), (a_high, b_low), (a_high, b_high)):
            found = [emit_mma(builder, "tf32", x[slab], y, found[slab]) for slab in range(SLABS)]
        for slab in range(SLABS):
            old = _old(builder, slabs[slab], j)
            yield j, slab, [builder.fadd(x, y) for x, y in zip(old, found[slab], strict=True)]


def _split(builder: Any, words: list[Any]) -> tuple[list[Any], list[Any]]:
    """The high and the low parts of words of float32 numbers.

    The high part is the nearest tf32 number, by integer arithmetic, which takes fewer instructions than the conversion. The low
    part is what is left; tensor cores cut it off after 11 significant bits. What they cut off has either sign. Infinity and NaN
    are in the low part, so that they meet the other number's high part alone, which has its sign. The high part is 1 or -1
    then: no product of it with the other number's low part, which may have the other sign, is infinite.
    """
    real, bits = ir.FloatType(), ir.IntType(32)
    half, mask = ir.Constant(bits, _TF32_UNIT // 2), ir.Constant(bits, 2**32 - _TF32_UNIT)
    largest, least = ir.Constant(bits, _LARGEST_BITS), ir.Constant(bits, _LARGEST_BITS + _SIGN_BIT)
    one, minus_one = ir.Constant(bits, _ONE_BITS), ir.Constant(bits, _ONE_BITS + _SIGN_BIT)

    def high_of(word: Any) -> Any:
        rounded = builder.add(word, half)
        rounded = builder.select(builder.icmp_signed("<", rounded, largest), rounded, one)  # of positive numbers
        rounded = builder.select(builder.icmp_unsigned("<", rounded, least), rounded, minus_one)  # of negative ones
        return builder.and_(rounded, mask)

    high = [high_of(word) for word in words]
    pairs = zip(words, high, strict=True)
    rests = [builder.fsub(builder.bitcast(word, real), builder.bitcast(part, real)) for word, part in pairs]  # exact
    return high, [builder.bitcast(rest, bits) for rest in rests]
