"""A token that is lost on one rank is lost on all: its gradient is NaN in every column, so all columns of its block survive."""

from __future__ import annotations

from typing import Any

import numpy as np

from cce_numba.arguments import Problem
from cce_numba.backend import Statistics


def keep_all_of_lost(p: Problem, merged: Statistics) -> None:
    """Sets, in place, all survivor bits of the blocks with a token that is lost by the merged statistics.

    A backend has done so by what it knew of its own shard. With array operations, which wait for no device.
    """
    bits = merged.survivors
    if bits is None or not p.N:
        return
    xp: Any = p.xp
    lost = xp.isnan(merged.lse) | xp.isnan(merged.target_logit).reshape(p.N, -1).any(axis=1)
    block, tokens = merged.survivor_block, merged.tokens
    places = xp.arange(len(tokens))
    by_place = lost[xp.where(places < merged.n_valid, tokens, 0)] & (places < merged.n_valid)
    n_blocks = -(-len(tokens) // block)
    padded = xp.zeros(n_blocks * block, bool)
    padded[: len(tokens)] = by_place
    of_block = padded.reshape(n_blocks, block).any(axis=1)
    every = xp.full(-(-p.V // 8), 0xFF, np.uint8)  # made on the device: nothing travels there, so a graph can capture it
    every[-1] = 0xFF >> (-p.V % 8)
    for first in range(0, len(bits), n_blocks) if n_blocks else ():  # planes, one after the other (`StatisticsForm`)
        plane = bits[first : first + n_blocks]
        plane |= xp.where(of_block[: len(plane), None], every, np.uint8(0))
