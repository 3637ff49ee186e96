"""The filter's rule, the same for all backends: which logits survive, at which thresholds, and what the others amount to.

Gradients need the entries of the vocabulary whose probability is not negligible. A forward can tell them while it sees the
logits, before the log-sum-exp is known, and notes one bit for each block of tokens and entry. An entry v survives in a block if
for any of the block's tokens n

    it is the target of n, or
    not (z[n, v] < threshold(bound[n], log_threshold(eps)))

with z the logits and bound[n] any lower bound of the final log-sum-exp of token n, such as its target's logit, or the
log-sum-exp of the logits so far. The probability of v is exp(z - lse) <= exp(z - bound), so a lower bound keeps everything that
reaches eps, and a little more. It is "not below" rather than "at least" so that NaN survives: where a token is lost (its
log-sum-exp or target logit is NaN) all entries of its block survive, since its gradient is NaN everywhere. A forward that
compares with "at least" must see to that by other means.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from cce_numba import logit
from cce_numba.integers import ceil_div
from cce_numba.options import Options

if TYPE_CHECKING:
    from cce_numba.arguments import Problem
    from cce_numba.backend import Statistics

SURVIVOR_BLOCK = 128  # tokens that share survivor bits; in the portable kernels the tiles decide

# Picking a column costs time. Where more than this share of all pairs of a block and a column survives, a backward takes all of
# them, in order, which is faster and exact. The number is a guess. On hopper, loss and gradients took 6.60 ms with all pairs,
# and 4.06 ms with the 39 % that survived on real text.
DENSE_SHARE = 0.7

# Logits are compared in the compute dtype, with rounding errors of up to 1e-5 (1 + |z|) in each; so a logit whose probability
# is exactly eps could fall below the threshold. This much slack, absolute and relative to the bound, keeps it. It has the
# effect of an eps that is some 0.1 % lower (more for logits of hundreds).
_SLACK, _RELATIVE_SLACK = 1e-3, 4e-5

# Where the caller leaves the choice to us, the threshold of dC is so many times the filter's own. On real text, dC at the first
# (2^-14 for bfloat16) has the error that dE has at the second (2^-16).
_COARSER = 4

_ROWS_BYTES = 32 * 2**20  # of e, and of c, at a time, in the compute dtype
_MOST_ROWS = 1024


def make_threshold(real: Any) -> Callable[[Any, Any], Any]:
    """Makes `threshold(bound, log_eps)`, what a logit must reach to survive, in arithmetic of `np.float32` or `np.float64`.

    It is a plain function of two numbers, for each backend to compile with its own `jit` and call where it folds logits:
    `bound`, a lower bound of the token's log-sum-exp, and `log_eps`, which is `log_threshold(eps)`, both of `real`. It grows
    with the bound, so a better bound never keeps more. Where the bound is inf or NaN it is NaN: nothing is below it.

    >>> float(make_threshold(np.float64)(2.0, log_threshold(2.0**-16)).round(3))
    -9.091
    """
    slack = real(_RELATIVE_SLACK)  # of `real`, or kernels of float32 would compute this in float64

    def threshold(bound: Any, log_eps: Any) -> Any:
        return bound - slack * abs(bound) + log_eps

    return threshold


def log_threshold(eps: float | None) -> float:
    """Natural log of the probability `eps`, less the absolute slack; -inf for None, which keeps all.

    >>> round(log_threshold(2.0**-16), 3)
    -11.091
    """
    return -math.inf if eps is None else math.log(eps) - _SLACK


def coarse_eps_of(options: Options) -> float | None:
    """A higher threshold, for the gradients of c and bias alone, for a backend that has a second one; None where it has not."""
    if options.filter_eps is None or not (options.filter_is_auto and options.filter_c_grad):
        return None
    return _COARSER * options.filter_eps


def unpack_survivors(statistics: Statistics, V: int) -> np.ndarray:
    """(ceil(n_valid / block), V) bool on the host, from the packed bits. Waits for the device, if there is one."""
    bits = statistics.survivors[: ceil_div(int(statistics.n_valid), statistics.survivor_block)]
    host = bits if isinstance(bits, np.ndarray) else bits.get()
    return np.unpackbits(host, axis=1, bitorder="little")[:, :V].astype(bool)


def dropped_mass(p: Problem, statistics: Statistics) -> Any:
    """(N,) of the compute dtype: the sum of the softmax over dropped entries; 0 where ignored or nothing was recorded.

    It is that sum itself, not 1 less what is kept, which would cancel. With array operations, for all backends: it is computed
    afterwards for whoever asks, so it need not be fast, but its memory stays bounded. Waits for the device.
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
                bits = statistics.survivors[n0 // block : ceil_div(n0 + len(some), block), v0 // 8 : ceil_div(v1, 8)]
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
    bias = None if p.bias is None else p.bias[v0 : v0 + len(c)].astype(p.compute_dtype, copy=False)
    scale = None if p.logit_scale is None else p.logit_scale[tokens][:, None]
    logit.finish_in_place(z, bias, scale, p.options.softcap)
    return p.xp.exp(z - lse[tokens][:, None])
