"""Products whose rows do not depend on their neighbours, for `batch_invariant=True`.

A BLAS may compute a row in one way or another: by the number of rows, and by where among them it stands. On an AMD EPYC,
OpenBLAS's float32 product gives one row three results by its place among 16, and one result alone among 8. So products have a
fixed number of rows here, the last one filled up with zeros, and that number is one at which all places are equal. It is found
by trying, for each shape: a product whose rows are all the same must have results that are all the same.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from cce_numba.cpu.blocks import ranges

ROWS = (64, 32, 16, 8, 4, 2, 1)  # those that are tried; the first is nearly as fast as larger ones, and the last always will do
_FEWEST_NUMBERS = 4096  # to be compared, so that sums in another order show
_TRIALS = 16  # at most


def multiply(a: Any, b: Any, out: Any = None) -> Any:
    """a (m, k) @ b (k, n) in products of one shape: a row of the result depends on this row of a, and on b, alone.

    >>> multiply(np.ones((3, 2)), np.ones((2, 1))).tolist()
    [[2.0], [2.0], [2.0]]
    """
    if not (b.flags.c_contiguous or b.flags.f_contiguous):
        b = np.ascontiguousarray(b)
    if out is None:
        out = np.empty((a.shape[0], b.shape[1]), a.dtype)
    count = rows_of(*b.shape, b.dtype, b.flags.c_contiguous)
    rows, products = np.zeros((count, a.shape[1]), a.dtype), np.empty((count, b.shape[1]), a.dtype)
    for start, stop in ranges(len(a), count):
        rows[: stop - start] = a[start:stop]
        rows[stop - start :] = 0
        np.matmul(rows, b, out=products)
        out[start:stop] = products[: stop - start]
    return out


@functools.lru_cache(maxsize=1024)
def rows_of(k: int, n: int, dtype: np.dtype, c_contiguous: bool) -> int:
    """The largest of `ROWS` at which all places are equal, in products with arrays (k, n) of this dtype and order."""
    return next(count for count in ROWS if count == 1 or _places_are_equal(count, k, n, dtype, c_contiguous))


def _places_are_equal(count: int, k: int, n: int, dtype: np.dtype, c_contiguous: bool) -> bool:
    rng = np.random.default_rng(0)
    for _ in range(min(_TRIALS, -(-_FEWEST_NUMBERS // n))):
        b = rng.standard_normal((k, n) if c_contiguous else (n, k)).astype(dtype)
        rows = np.broadcast_to(rng.standard_normal(k).astype(dtype), (count, k)).copy()
        products = np.matmul(rows, b if c_contiguous else b.T)
        if (products != products[0]).any():
            return False
    return True
