"""What kernels take, as numba's types and as bytes: the driver takes a kernel's arguments as one block, laid out as C would."""

from __future__ import annotations

import functools
import importlib
import struct
from typing import Any

import numpy as np
from numba.cuda import types

from cce_numba.interchange import BFLOAT16

_FORMATS = {
    types.boolean: "?",
    types.int32: "i",
    types.int64: "q",
    types.uint64: "Q",
    types.float32: "f",
    types.float64: "d",
}


@functools.cache
def number_type(dtype: Any) -> Any:
    """The numba type of an array's elements. bfloat16, which numba has not, is read by its bits.

    >>> number_type(np.float32), number_type(BFLOAT16)
    (float32, uint16)
    """
    dtype = np.dtype(np.uint16) if dtype == BFLOAT16 else np.dtype(dtype)
    return importlib.import_module("numba.cuda.np.numpy_support").from_dtype(dtype)


def pointer_to(dtype: Any) -> Any:
    """The numba type of an array's address."""
    return types.CPointer(number_type(dtype))


@functools.cache
def array_type(dtype: np.dtype, ndim: int, contiguous: bool) -> Any:
    """The numba type of an array; a contiguous one is indexed without reading the stride of its last dimension."""
    return types.Array(number_type(dtype), ndim, "C" if contiguous else "A")


def array_values(array: Any) -> tuple[int, ...]:
    """The numbers that numba's array argument is made of, for a CuPy array.

    In order: two objects that only the CPU has, elements, bytes of an element, address, shape, strides in bytes.
    """
    return (0, 0, array.size, array.itemsize, array.data.ptr, *array.shape, *array.strides)


def depth_of(kind: Any) -> int:
    """How deep a parameter's numbers lie: 0 for a number or an address, 1 for a record of these, 2 for a record of records.

    >>> depth_of(types.int32), depth_of(types.UniTuple(types.int32, 2))
    (0, 1)
    """
    return 1 + max(map(depth_of, kind.types), default=0) if isinstance(kind, types.BaseTuple) else 0


def layout_of(signature: Any) -> struct.Struct:
    """The bytes of a kernel's arguments.

    >>> layout_of(types.void(types.boolean, types.float64, types.float32)).size
    20
    """
    return struct.Struct("@" + "".join(_format(kind) for kind in signature.args))


def offsets_of(layout: struct.Struct) -> list[int]:
    """Where each number of a layout begins, in bytes.

    >>> offsets_of(layout_of(types.void(types.boolean, types.float64, types.float32)))
    [0, 8, 16]
    """
    letters = layout.format.removeprefix("@")
    return [struct.calcsize("@" + letters[: i + 1]) - struct.calcsize(letter) for i, letter in enumerate(letters)]


def _format(kind: Any) -> str:
    """The letters of `struct` for a parameter: one for a number or an address, those of the parts for what has parts."""
    if isinstance(kind, types.BaseTuple):
        return "".join(_format(part) for part in kind.types)
    if isinstance(kind, types.CPointer):
        return "Q"
    if isinstance(kind, types.Array):
        return "QQqqQ" + "q" * (2 * kind.ndim)
    if kind not in _FORMATS:
        raise TypeError(f"kernels here take {', '.join(map(str, _FORMATS))}, pointers, arrays and tuples of these, not {kind}")
    return _FORMATS[kind]
