"""Tensor maps: 128 opaque bytes that describe a matrix in device memory to the bulk copy engine.

CUDA driver API, cuTensorMapEncodeTiled.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import numpy as np

from cce_numba.launch.blank import Place
from cce_numba.tensor_core.matrices import pitch_bytes

WORDS = 16  # of 64 bits
MAP_BYTES = np.uint64(8 * WORDS)


def encode(matrix: Any, box_rows: int, box_columns: int) -> tuple[int, ...]:
    """The tensor map, as 64-bit words, of a (rows, columns) CuPy matrix, read in boxes with the 128-byte swizzle.

    The matrix is of float16 or bfloat16.
    """
    rows, columns = matrix.shape
    return _at(matrix.data.ptr, rows, columns, pitch_bytes(matrix), box_rows, box_columns, matrix.dtype == np.float16)


def encode_matrix(pointer: int, rows: int, columns: int, pitch: int, box: int, dtype: np.dtype) -> tuple[int, ...]:
    """As `encode`, of a matrix at an address whose rows are `pitch` bytes apart, read in boxes of `box` rows and columns."""
    return _at(pointer, rows, columns, pitch, box, box, dtype == np.float16)


def _at(pointer: int | Place, *others: Any) -> tuple[Any, ...]:
    """The map of a matrix at an address, or of one at the address that a place will have."""
    if isinstance(pointer, Place):
        return pointer.mapped(lambda address: _encode(address, *others), WORDS)
    return _encode(pointer, *others)


@functools.lru_cache(maxsize=256)
def _encode(
    pointer: int, rows: int, columns: int, pitch: int, box_rows: int, box_columns: int, is_float16: bool
) -> tuple[int, ...]:
    """Remembered by its arguments: the driver only encodes them, and looks at no memory."""
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
