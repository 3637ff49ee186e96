"""What several workers found for the same tokens is put together, and stored for each token."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda

from cce_numba.integers import ceil_div
from cce_numba.launch.kernel import Kernel, kernel_factory
from cce_numba.launch.record import Record
from cce_numba.tensor_core import schedule
from cce_numba.tensor_core.folds import Fold, Row, chain, found_class, number_count
from cce_numba.tensor_core.folds.rows import make_load_numbers, make_shuffle_numbers
from cce_numba.tensor_core.kept import TILE_V
from cce_numba.tensor_core.records import I32, Parts, Survivors, Tokens
from cce_numba.tensor_core.tokens import token_at

_WARPS = 4  # of a CTA, each with a token
_COLUMNS = TILE_V  # of the tiles that the folds are made for. No tile comes here, so any will do for which all can be made


class Split(Record):
    """How the work was split, see `schedule`."""

    workers = I32
    per_round = I32  # groups of tokens
    n_tiles = I32  # of the vocabulary
    V = I32


@kernel_factory
def make_merge_kernel(group_n: int, folds: tuple[Fold, ...], fixed: bool = False) -> Kernel:
    """The kernel for groups of `group_n` tokens: a warp for each token. fixed: of a fixed schedule."""
    warps, count, folded = _WARPS, number_count(folds), chain(folds, _COLUMNS)
    slots_of, quotient = schedule.fixed_slots_of if fixed else schedule.slots_of, schedule.quotient
    nothing, merge, store = folded.nothing, folded.merge, folded.store
    load_numbers, shuffle_numbers = make_load_numbers(count), make_shuffle_numbers(count)

    def merge_kernel(parts: Parts, split: Split, tokens: Tokens, found: Any, survivors: Survivors) -> None:
        """Merges the parts of each listed token's group, over its slots, and stores what they say."""
        lane, position = cuda.threadIdx.x & 31, np.int32(cuda.blockIdx.x * warps + (cuda.threadIdx.x >> 5))
        n_listed = np.int32(min(max(tokens.n_valid[0] - tokens.first, 0), tokens.most))
        if position >= n_listed:
            return
        token, group, row = token_at(tokens.listed, position), quotient(position, group_n), position % group_n
        groups = quotient(n_listed + group_n - 1, group_n)
        first, step, shared, extra = slots_of(group, split.workers, groups, split.per_round, split.n_tiles)
        mine, others = nothing(), shared + 1 if extra >= 0 else shared
        for i in range(lane, others, 32):
            slot = first + i * step if i < shared else extra
            at = parts.numbers + np.uint64(4 * (np.int64(slot) * group_n + row))
            mine = merge(mine, load_numbers(at, 4 * parts.pitch))
        for mask in (16, 8, 4, 2, 1):
            mine = merge(mine, shuffle_numbers(mine, np.uint32(mask)))
        store(mine, Row(token, np.int64(position), np.int32(lane), split.V), found, survivors)

    return Kernel(merge_kernel, (Parts, Split, Tokens, found_class(folds), Survivors), threads=32 * _WARPS)


def ctas_for(N: int) -> int:
    """Enough for a warp a token."""
    return ceil_div(N, _WARPS)
