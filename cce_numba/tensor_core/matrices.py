"""What matrices must be like for kernels to read and write them 16 bytes at a time, and copies that are so."""

from __future__ import annotations

from typing import Any

from cce_numba import gpu
from cce_numba.integers import ceil_div
from cce_numba.launch.blank import require_memory

_LARGEST_PITCH_BYTES = 2**32  # what is copied row by row multiplies with 32 bits
_ALIGNMENT_BYTES = 16  # of the address and of the distance between rows


def why_not(matrix: Any) -> str | None:
    """Why the copy engine cannot read a (rows, columns) CuPy matrix as it lies, or None if it can."""
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
    return matrix.strides[0] if matrix.shape[0] > 1 else matrix.itemsize * padded_columns(matrix.shape[1])


def padded_columns(columns: int) -> int:
    """The row length of a copy that the engine can read."""
    return ceil_div(columns, 8) * 8


def why_not_by_rows(matrix: Any) -> str | None:
    """Why rows cannot be copied one by one as they lie, 16 bytes at a time, or None if they can; asks more than `why_not`."""
    if matrix.shape[1] != padded_columns(matrix.shape[1]):
        return f"its rows of {matrix.shape[1]} elements are not a multiple of {_ALIGNMENT_BYTES} bytes long"
    return why_not(matrix)


def aligned(matrix: Any) -> Any:
    """The matrix, or a copy whose rows are whole 16 bytes, zeros at their end: so rows can be copied one by one, too."""
    if why_not_by_rows(matrix) is None:
        return matrix
    require_memory(matrix)
    copy = gpu.cupy().zeros((matrix.shape[0], padded_columns(matrix.shape[1])), matrix.dtype)
    copy[:, : matrix.shape[1]] = matrix
    return copy[:, : matrix.shape[1]]


def whole_chunks(gradient: Any, with_values: bool) -> Any:
    """The (rows, columns) array, or an array of its shape whose rows can be stored 16 bytes at a time.

    with_values: that array holds the same numbers; else whatever is in its memory.
    """
    rows, columns = gradient.shape
    padded = padded_columns(columns)
    if gradient.flags.c_contiguous and columns == padded and gradient.data.ptr % _ALIGNMENT_BYTES == 0:
        return gradient
    require_memory(gradient)
    copy = gpu.cupy().empty((rows, padded), gradient.dtype)[:, :columns]
    if with_values:
        copy[...] = gradient
    return copy
