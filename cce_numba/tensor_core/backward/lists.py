"""Lists of columns: which columns of a block survive, and where the list of a slot's column is."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda

from cce_numba.ptx import control, memory
from cce_numba.tensor_core.sums import FULL, sum_up_to


@cuda.jit(device=True, forceinline=True)
def largest_at_most(prefix: Any, first: Any, count: Any, value: Any, lane: Any) -> Any:
    """By a warp: the largest i, an int32 below count, with prefix[first + i] <= value.

    prefix: pointer to int32, which ascend from prefix[first] on; prefix[first] <= value.
    """
    i = np.int32(0)
    while True:
        probe = np.int32(i + lane + 1)
        holds = probe < count and prefix[first + probe] <= value
        more = np.int32(cuda.popc(np.uint32(cuda.ballot_sync(FULL, holds))))
        i = np.int32(i + more)
        if more < 32:
            return i


@cuda.jit(device=True, forceinline=True)
def expand(columns: Any, wanted: Any, skipped: Any, bits: Any, row: Any, first_word: Any, end_word: Any, lane: Any) -> None:
    """By a warp: passes over `skipped` columns that survive in a block, and writes the numbers, as sorted, of `wanted` more.

    columns: address in shared memory of (wanted,) int32. bits: pointer to words of survivor bits. row: where the block's words
    begin. first_word, end_word: the words of the block that are looked at are those from first_word on, before end_word.
    """
    word, found = np.int32(first_word), np.int32(-skipped)
    while found < wanted:
        mine = np.uint32(0)
        if word + lane < end_word:
            mine = bits[row + word + lane]
        count = np.int32(cuda.popc(mine))
        up_to = sum_up_to(count)
        position = np.int32(found + up_to - count)
        while mine != 0 and position < wanted:
            if position >= 0:
                column = 32 * (word + lane) + cuda.ffs(np.int32(mine)) - 1
                memory.store_shared_i32(np.uint32(columns + np.uint32(4 * position)), np.int32(column))
            mine = np.uint32(mine & (mine - np.uint32(1)))
            position = np.int32(position + 1)
        found = np.int32(found + control.shuffle_i32(np.int32(up_to), np.uint32(31)))
        word = np.int32(word + 32)


@cuda.jit(device=True, forceinline=True)
def listed_place(slot: Any) -> Any:
    """The place of a slot's column in `Workspace.lists`.

    Slots are listed by 64. Of those, slots that are 8 apart are listed together, since the same gathering thread copies the
    rows of c of their columns.
    """
    return np.int32((slot & -64) | ((slot & 7) << 3) | ((slot >> 3) & 7))
