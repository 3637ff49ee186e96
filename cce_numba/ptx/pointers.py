"""Pointers of kernels (`types.CPointer`), seen as an address or as numbers of another type. None of it is an instruction."""

from __future__ import annotations

import functools
from typing import Any

from llvmlite import ir
from numba.cuda import types
from numba.cuda.core.errors import NumbaTypeError

from cce_numba.ptx.instruction import U64, as_intrinsic


def _check_pointer(name: str, given: Any) -> None:
    if not isinstance(given, types.CPointer):
        raise NumbaTypeError(f"{name}: operand 0 must be a pointer, got {given}")


def _define_address_of(_: Any, pointer: Any) -> Any:
    _check_pointer("address_of", pointer)

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.ptrtoint(values[0], ir.IntType(64))

    return U64(pointer), generate


address_of = as_intrinsic(
    _define_address_of, 1, "address_of", "(pointer): its address in bytes, a uint64, as instructions of `memory` take it."
)


@functools.cache
def view_as(number: Any) -> Any:
    """The function that gives a pointer to the same memory, read and written as numbers of another type.

    In a kernel that takes a pointer `x` to float32: `view_as(types.uint32)(x)[i]` are the bits of x[i].
    """
    pointer_type = types.CPointer(number)

    def define(_: Any, pointer: Any) -> Any:
        _check_pointer(f"view_as({number})", pointer)

        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            return builder.bitcast(values[0], context.get_value_type(pointer_type))

        return pointer_type(pointer), generate

    return as_intrinsic(define, 1, f"view_as({number})")
