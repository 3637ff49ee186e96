"""The survivor rule's threshold, one for all backends (design: a lower bound of the log-sum-exp never misses a survivor)."""

from __future__ import annotations

import math

# Logits are compared in the compute dtype, with rounding errors of up to 1e-5 (1 + |z|) in each; so a probability that is
# exactly eps could fall below it. This much slack, absolute and relative to the bound, keeps it, and is
# as if eps were some 0.1 % lower (more for logits of hundreds).
_SLACK = 1e-3
RELATIVE_SLACK = 4e-5


def log_threshold(eps: float | None) -> float:
    """Natural log of what a logit, less a lower bound of the log-sum-exp, must reach to be flagged; -inf flags all.

    >>> round(log_threshold(2.0**-16), 3)
    -11.091
    """
    return -math.inf if eps is None else math.log(eps) - _SLACK
