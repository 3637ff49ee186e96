"""The survivor rule's threshold, one for all backends (design: a lower bound of the log-sum-exp never misses a survivor)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from cce_numba.arguments import Problem
from cce_numba.integers import ceil_div

if TYPE_CHECKING:
    from cce_numba.backend import Statistics

SURVIVOR_BLOCK = 128  # tokens that share survivor bits, but in the portable kernels, where tiles say it

# Picking columns costs time for each. Where more than this share of all pairs of a block and a column survives, all of them are
# taken, in order, which is faster and exact. A guess: on hopper, loss and gradients of 39 % took 0.61 of the time of all.
DENSE_SHARE = 0.7

# Logits are compared in the compute dtype, with rounding errors of up to 1e-5 (1 + |z|) in each; so a probability that is
# exactly eps could fall below it. This much slack, absolute and relative to the bound, keeps it, and is
# as if eps were some 0.1 % lower (more for logits of hundreds).
_SLACK = 1e-3
RELATIVE_SLACK = 4e-5


# dC's threshold where the caller leaves it to us, in the filter's: on real text its error is then what dE's is at the filter's
# own (2^-14 and 2^-16 for bfloat16).
_COARSER = 4


def coarse_eps_of(options: Any) -> float | None:
    """The threshold of the gradient of c, of `arguments.Options`, for a backend that gives it one of its own; or None."""
    if options.filter_eps is None or not (options.filter_is_auto and options.filter_c_grad):
        return None
    return _COARSER * options.filter_eps


def log_threshold(eps: float | None) -> float:
    """Natural log of what a logit, less a lower bound of the log-sum-exp, must reach to be flagged; -inf flags all.

    >>> round(log_threshold(2.0**-16), 3)
    -11.091
    """
    return -math.inf if eps is None else math.log(eps) - _SLACK


def survivor_bytes(p: Problem, block: int) -> int:
    """Bytes of the survivor bits: one bit per block of tokens and vocabulary entry."""
    return ceil_div(p.N, block) * ceil_div(p.V, 8)


def unpack_survivors(statistics: Statistics, V: int) -> np.ndarray:
    """(ceil(n_valid / block), V) bool on the host, from the packed bits. Waits for the device, if there is one."""
    bits = statistics.survivors[: ceil_div(int(statistics.n_valid), statistics.survivor_block)]
    host = bits if isinstance(bits, np.ndarray) else bits.get()
    return np.unpackbits(host, axis=1, bitorder="little")[:, :V].astype(bool)
