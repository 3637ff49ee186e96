"""Large matrices in bfloat16, made some rows at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cce_numba.interchange import BFLOAT16

ROWS = 8192  # rows that are made at a time


def by_rows(rows: int, D: int, make: Callable[[int, int], Any], xp: Any) -> Any:
    """(rows, D) bfloat16, out of the float32 rows `make(start, stop)`, which are never in memory all at once."""
    out = xp.empty((rows, D), BFLOAT16)
    for start in range(0, rows, ROWS):
        stop = min(start + ROWS, rows)
        out[start:stop] = make(start, stop).astype(BFLOAT16)
    return out
