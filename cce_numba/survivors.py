"""The survivor rule's threshold, one for all backends (design: a lower bound of the log-sum-exp never misses a survivor)."""

from __future__ import annotations

import math
from typing import Any

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
