"""Operands of `wgmma` in shared memory, as stages of a ring hold them: rows, or panels, of 128 bytes with the 128-byte swizzle.

A stage holds 64 terms of the sum, K. An operand whose rows run along K has one row of 128 bytes for each of its M or N indices,
64 rows after the other. One whose rows run along M or N is transposed by the tensor cores: it has panels of 64 M or N indices,
with one row of 128 bytes for each of the 64 terms.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda

from cce_numba.ptx.wgmma import PANEL_BYTES, SWIZZLE_128B, SWIZZLE_128B_PANELS

_UNIT_BYTES = 16  # descriptors count in these
_ADDRESS_BITS = np.uint32(0x3FFFF)  # of a shared address, that a descriptor has room for

# From a descriptor of 64 rows, or of a panel, to that of the next 64 rows or the next panel.
NEXT_PANEL = np.uint64(PANEL_BYTES // _UNIT_BYTES)


def form_of(transposed: bool) -> np.uint64:
    """A descriptor without its address: of rows along K, or, transposed, of panels."""
    return SWIZZLE_128B_PANELS if transposed else SWIZZLE_128B


def step_of(transposed: bool) -> np.uint64:
    """From the descriptor of 16 terms to that of the next 16: 32 bytes of each row, or, transposed, 16 rows of a panel."""
    return np.uint64((16 * 128 if transposed else 16 * 2) // _UNIT_BYTES)


@cuda.jit(device=True, forceinline=True)
def descriptor(form: Any, shared_address: Any) -> Any:
    """The descriptor, a uint64, of the operand of that form at a multiple of 1024 bytes. ISA 9.7.15.5.1."""
    return form | np.uint64((np.uint32(shared_address) & _ADDRESS_BITS) >> np.uint32(4))
