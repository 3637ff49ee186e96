"""A token that is lost on one rank is lost on all: its gradient is NaN in every column, so all columns of its block survive."""

from __future__ import annotations

from typing import Any

from cce_numba.arguments import Problem
from cce_numba.backend import Statistics
from cce_numba.survivors import keep_blocks_with


def keep_all_of_lost(p: Problem, merged: Statistics) -> None:
    """Sets, in place, all survivor bits of the blocks with a token that is lost by the merged statistics.

    A backend has done so by what it knew of its own shard. With array operations, which wait for no device.
    """
    if merged.survivors is None or not p.N:
        return
    xp: Any = p.xp
    keep_blocks_with(xp.isnan(merged.lse) | xp.isnan(merged.target_logit).reshape(p.N, -1).any(axis=1), p, merged)
