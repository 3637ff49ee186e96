"""Matrix products of a warp on tensor cores, `mma.sync`, and the loads of their operands. ISA 9.7.14.5. From sm_80 on.

`D (16, 8) += A (16, K) @ B (8, K).T`: a lane holds a part of each in registers, of D in float32 as a fragment of eight columns
(`ptx.fragment`). Operands are words of two 16-bit numbers that follow each other along K, or words of one tf32 number:

    A    word 0: row lane // 4, from number 2 * (lane % 4) on; word 1: 8 rows further down; words 2 and 3: 8 numbers further on
    B    word 0: row lane // 4, from number 2 * (lane % 4) on; word 1: 8 numbers further on

So each word is an 8 x 8 matrix of 16-bit numbers, spread over the lanes, as `load_matrices` fetches it from shared memory. For
tf32, where K is 8, read "number lane % 4" and "4 numbers further on".
"""

from __future__ import annotations

import functools
from typing import Any

from llvmlite import ir
from numba.cuda import types

from cce_numba.ptx.instruction import F32, U32, emit, instruction

_SHAPES = {"bf16": "m16n8k16", "f16": "m16n8k16", "tf32": "m16n8k8"}


@functools.cache
def mma(dtype: str) -> Any:
    """The product of "bf16", "f16" or "tf32" operands: `d = mma(dtype)(a0, a1, a2, a3, b0, b1, d0, d1, d2, d3)`.

    By all lanes of a warp; d is four float32. ISA 9.7.14.5.8. Raises ValueError for other dtypes.
    """
    doc = "(four words of A, two of B, four sums): the sums, with the product. ISA 9.7.14.5.8."
    operands = (U32,) * 6 + (F32,) * 4
    name = _template(dtype).split()[0]
    return instruction(_template(dtype), operands, types.UniTuple(F32, 4), ordered=False, together=True, name=name, doc=doc)


def _template(dtype: str) -> str:
    if dtype not in _SHAPES:
        raise ValueError(f"mma: dtype must be one of {', '.join(map(repr, _SHAPES))}, got {dtype!r}")
    mnemonic = f"mma.sync.aligned.{_SHAPES[dtype]}.row.col.f32.{dtype}.{dtype}.f32"
    return f"{mnemonic} {{$0, $1, $2, $3}}, {{$4, $5, $6, $7}}, {{$8, $9}}, {{$10, $11, $12, $13}};"


@functools.cache
def load_matrices(count: int, transposed: bool = False) -> Any:
    """The load of 1, 2 or 4 matrices of 8 x 8 16-bit numbers: `words = load_matrices(count)(shared address)`.

    By all lanes of a warp. Lane 8 * i + j says where the 16 bytes of row j of matrix i are. A lane gets a word of each matrix:
    of row lane // 4, the numbers from 2 * (lane % 4) on; transposed, the same of the matrix whose columns are the rows in
    shared memory. ISA 9.7.14.5.15. Raises ValueError for other counts.
    """
    doc = "(shared address of a row): a word of each matrix. ISA 9.7.14.5.15."
    result = U32 if count == 1 else types.UniTuple(U32, count)
    return instruction(_load_template(count, transposed), (U32,), result, doc=doc)


def _load_template(count: int, transposed: bool) -> str:
    if count not in (1, 2, 4):
        raise ValueError(f"ldmatrix: count must be 1, 2 or 4, got {count}")
    mnemonic = f"ldmatrix.sync.aligned.m8n8.x{count}{'.trans' if transposed else ''}.shared.b16"
    return f"{mnemonic} {{{', '.join(f'${i}' for i in range(count))}}}, [${count}];"


transpose_matrix = instruction(
    "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;",
    (U32,),
    U32,
    ordered=False,
    together=True,
    doc="(a lane's word of an 8 x 8 matrix of 16-bit numbers): the lane's word of the transposed one. ISA 9.7.14.5.17.",
)


def emit_mma(builder: Any, dtype: str, a: list[Any], b: list[Any], sums: list[Any]) -> list[Any]:
    """For code that is generated: puts a product where the builder stands, and returns its four sums. LLVM values all."""
    result = ir.LiteralStructType([ir.FloatType()] * 4)
    constraints = ["=f"] * 4 + ["r"] * 6 + ["f"] * 4
    value = emit(builder, result, _template(dtype), constraints, [*a, *b, *sums], ordered=False, together=True)
    return [builder.extract_value(value, i) for i in range(4)]


def emit_load(builder: Any, address: Any, transposed: bool) -> list[Any]:
    """For code that is generated: puts the load of four matrices where the builder stands, and returns its four words."""
    result = ir.LiteralStructType([ir.IntType(32)] * 4)
    constraints = ["=r"] * 4 + ["r", "~{memory}"]
    value = emit(builder, result, _load_template(4, transposed), constraints, [address])
    return [builder.extract_value(value, i) for i in range(4)]


def emit_load_word(builder: Any, address: Any, offset: int) -> Any:
    """For code that is generated: puts the load of 32 bits at a shared address, so many bytes on, where the builder stands."""
    return emit(builder, ir.IntType(32), f"ld.shared.b32 $0, [$1+{offset}];", ["=r", "r", "~{memory}"], [address])


def emit_round_to_tf32(builder: Any, word: Any) -> Any:
    """For code that is generated: the bits of a float32 become those of the nearest tf32 number. ISA 9.7.9, cvt."""
    number = builder.bitcast(word, ir.FloatType())
    return emit(builder, ir.IntType(32), "cvt.rna.tf32.f32 $0, $1;", ["=r", "f"], [number], ordered=False)
