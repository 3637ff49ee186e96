"""Tensor maps: 128 opaque bytes that describe a matrix in device memory to the bulk copy engine.

CUDA driver API, cuTensorMapEncodeTiled.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import numpy as np

WORDS = 16  # of 64 bits
_LARGEST_PITCH_BYTES = 2**32  # what is copied row by row multiplies with 32 bits
_ALIGNMENT_BYTES = 16  # of the address and of the distance between rows


def why_not(matrix: Any) -> str | None:
    """Why the copy engine cannot read a (rows, columns) CuPy matrix of 16-bit numbers as it lies, or None if it can."""
    if matrix.shape[1] > 1 and matrix.strides[1] != matrix.itemsize:
        return f"the elements of a row are {matrix.strides[1]} bytes apart, not {matrix.itemsize}"
    if matrix.data.ptr % _ALIGNMENT_BYTES:
        return f"it does not start at a multiple of {_ALIGNMENT_BYTES} bytes"
    if matrix.shape[0] > 1 and (matrix.strides[0] % _ALIGNMENT_BYTES or matrix.strides[0] <= 0):
        return f"its rows are {matrix.strides[0]} bytes apart, not a positive multiple of {_ALIGNMENT_BYTES}"
    if matrix.shape[0] > 1 and matrix.strides[0] >= _LARGEST_PITCH_BYTES:
        return f"its rows are {matrix.strides[0]} bytes apart, not less than {_LARGEST_PITCH_BYTES}"
    if matrix.shape[0] > 1 and matrix.strides[0] < matrix.shape[1] * matrix.itemsize:
        return f"its rows are {matrix.strides[0]} bytes apart, and overlap"
    return None


def pitch_bytes(matrix: Any) -> int:
    """Bytes from one row to the next, of a matrix that the copy engine can read."""
    return matrix.strides[0] if matrix.shape[0] > 1 else -(-matrix.shape[1] * 2 // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def padded_columns(columns: int) -> int:
    """The row length of a copy that the engine can read."""
    return -(-columns // 8) * 8


def encode(matrix: Any, box_rows: int, box_columns: int) -> tuple[int, ...]:
    """The tensor map, as 64-bit words, of a (rows, columns) CuPy matrix, read in boxes with the 128-byte swizzle.

    The matrix is of float16 or bfloat16.
    """
    rows, columns = matrix.shape
    return _encode(matrix.data.ptr, rows, columns, pitch_bytes(matrix), box_rows, box_columns, matrix.dtype == np.float16)


def encode_matrix(pointer: int, rows: int, columns: int, pitch: int, box: int, dtype: np.dtype) -> tuple[int, ...]:
    """As `encode`, of a matrix at an address whose rows are `pitch` bytes apart, read in boxes of `box` rows and columns."""
    return _encode(pointer, rows, columns, pitch, box, box, dtype == np.float16)


def why_not_by_rows(matrix: Any) -> str | None:
    """Why its rows cannot be copied one by one as they lie, 16 bytes at a time, beside `why_not`; or None if they can."""
    if matrix.shape[1] != padded_columns(matrix.shape[1]):
        return f"its rows of {matrix.shape[1]} elements are not a multiple of {_ALIGNMENT_BYTES} bytes long"
    return why_not(matrix)


def aligned(matrix: Any) -> Any:
    """The matrix, or a copy whose rows are whole 16 bytes, zeros at their end: so rows can be copied one by one, too."""
    if why_not_by_rows(matrix) is None:
        return matrix
    copy = importlib.import_module("cupy").zeros((matrix.shape[0], padded_columns(matrix.shape[1])), matrix.dtype)
    copy[:, : matrix.shape[1]] = matrix
    return copy[:, : matrix.shape[1]]


def whole_chunks(gradient: Any, with_values: bool) -> Any:
    """The (rows, columns) array, or a copy whose rows can be stored 16 bytes at a time; empty without values."""
    rows, columns = gradient.shape
    padded = padded_columns(columns)
    if gradient.flags.c_contiguous and columns == padded and gradient.data.ptr % _ALIGNMENT_BYTES == 0:
        return gradient
    copy = importlib.import_module("cupy").empty((rows, padded), gradient.dtype)[:, :columns]
    if with_values:
        copy[...] = gradient
    return copy


@functools.lru_cache(maxsize=256)
def _encode(
    pointer: int, rows: int, columns: int, pitch: int, box_rows: int, box_columns: int, is_float16: bool
) -> tuple[int, ...]:
    """A function of its arguments alone, so that it can be remembered: the driver only writes down what it is told."""
    d = importlib.import_module("cuda.bindings.driver")
    dtypes = d.CUtensorMapDataType
    error, tensor_map = d.cuTensorMapEncodeTiled(
        dtypes.CU_TENSOR_MAP_DATA_TYPE_FLOAT16 if is_float16 else dtypes.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        2,
        pointer,
        [d.cuuint64_t(columns), d.cuuint64_t(rows)],
        [d.cuuint64_t(pitch)],
        [d.cuuint32_t(box_columns), d.cuuint32_t(box_rows)],
        [d.cuuint32_t(1), d.cuuint32_t(1)],
        d.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        d.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        d.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        d.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    if int(error):
        raise RuntimeError(
            f"cuTensorMapEncodeTiled: {error.name} for a ({rows}, {columns}) matrix at {pointer:#x} "
            f"with rows {pitch} bytes apart"
        )
    return tuple(int(word) for word in tensor_map.opaque)
