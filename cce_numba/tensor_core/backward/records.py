"""What device functions of the backwards hand each other, by name."""

from __future__ import annotations

from cce_numba.launch.record import Record
from cce_numba.survivors import SURVIVOR_BLOCK
from cce_numba.tensor_core.records import I32, U32

G_ROW_BYTES = 2 * SURVIVOR_BLOCK  # of a column of G of a block, which is a row in the workspace
PARTS = 8  # of the sum of a column of G of a block: one of 16 tokens each


class ListColumns(Record):
    """The columns of a job that computes G."""

    ids = U32  # address in shared memory of (192,) int32: vocabulary entries, -1 past the list's end
    biases = U32  # address in shared memory of (192,) float32
    scales = U32  # address in shared memory of (192,) float32, for the unbiased filter
    stored = I32  # columns that are stored, a multiple of 64
