"""The loss out of the tokens' negative log-likelihoods, as arrays: what backends do that have no kernel for it."""

from __future__ import annotations

from typing import Any

import numpy as np

from cce_numba.arguments import Problem
from cce_numba.backend import Statistics


def reduced_nll(p: Problem, statistics: Statistics) -> Any:
    """See `backend.Backend`."""
    total = (statistics.lse - statistics.target_logit).sum(dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):  # no token counts: 0 / 0 = nan, as PyTorch has it
        loss = total / statistics.n_valid if p.options.reduction == "mean" else total
    return p.xp.asarray(loss, dtype=p.compute_dtype)
