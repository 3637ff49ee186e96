"""What the filter drops: the probability of each token that falls on entries that its block leaves out, with array operations.

One implementation for all backends, for whoever asks afterwards: nothing here needs to be fast, but memory stays bounded.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cce_numba import logit
from cce_numba.arguments import Problem
from cce_numba.backend import Statistics

_ROWS_BYTES = 32 * 2**20  # of e, and of c, at a time, in the compute dtype
_MOST_ROWS = 1024


def mass(p: Problem, statistics: Statistics) -> Any:
    """(N,) of the compute dtype: the sum of the softmax over dropped entries; 0 where ignored or nothing was recorded.

    It is that sum itself, not 1 less what is kept, which would cancel. Waits for the device.
    """
    xp: Any = p.xp
    result = xp.zeros(p.N, p.compute_dtype)
    if statistics.survivors is None:
        return result
    tokens = statistics.tokens[: int(statistics.n_valid)]
    block = statistics.survivor_block
    rows = max(8, min(_MOST_ROWS, _ROWS_BYTES // (p.compute_dtype.itemsize * p.D)) // 8 * 8)
    group = max(1, rows // block) * block
    total = xp.zeros(len(tokens), np.float64)
    with np.errstate(all="ignore"):  # what is lost is NaN, and dropped by nobody
        for v0 in range(0, p.V, rows):
            v1 = min(v0 + rows, p.V)
            c = p.c[v0:v1].astype(p.compute_dtype, copy=False)
            for n0 in range(0, len(tokens), group):
                some = tokens[n0 : n0 + group]
                bits = statistics.survivors[n0 // block : -(-(n0 + len(some)) // block), v0 // 8 : -(-v1 // 8)]
                drops = (bits[:, :, None] >> xp.arange(8, dtype=np.uint8) & 1).reshape(len(bits), -1)[:, : v1 - v0] == 0
                probabilities = _softmax(p, some, c, v0, statistics.lse)
                dropped = xp.where(drops.repeat(block, axis=0)[: len(some)], probabilities, 0)
                total[n0 : n0 + group] += dropped.sum(axis=1, dtype=np.float64)
    result[tokens] = total.astype(p.compute_dtype)
    return result


def _softmax(p: Problem, tokens: Any, c: Any, v0: int, lse: Any) -> Any:
    """(n, v) of the compute dtype: the softmax of these tokens at the entries from v0 on, whose rows are `c`."""
    e = p.e.view(f"u{p.dtype.itemsize}")[tokens].view(p.dtype)  # by bits: CuPy need not know how to pick bfloat16
    z = e.astype(p.compute_dtype, copy=False) @ c.T
    bias = None if p.bias is None else p.bias[v0 : v0 + len(c)]
    scale = None if p.logit_scale is None else p.logit_scale[tokens][:, None]
    logit.finish_in_place(z, bias, scale, p.options.softcap)
    return p.xp.exp(z - lse[tokens][:, None])
