"""Who computes which tiles: every worker about as many, and all of them at about the same place in the vocabulary.

A worker is a cluster; a group is the tokens that a cluster takes at a time. Work goes in rounds of `per_round` groups: few
enough that their rows of `e` stay in the L2 cache while `c` streams by. Several workers share a group. They take its tiles in
turn, and not one contiguous part each. So all workers read the same rows of `c` at about the same time, and each worker sees a
fair sample of the vocabulary early on, by which it flags fewer survivors. The last round may have fewer groups. Workers that an
even share leaves over then take the last tiles of each group.

So how a group's tiles are shared depends on how many groups there are, and a token's numbers on its batch, by their rounding. A
*fixed* schedule shares the tiles of each group among as many workers, in the last round too. Others are idle there.

A slot is the place of what one worker finds of one group. These rounds and slots belong to the forward; those of the backward
(`survey`) are something else.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba.cuda.extending import register_jitable

NO_SLOT = -1


@register_jitable
def segment(index: Any, worker: Any, workers: Any, groups: Any, per_round: Any, tiles: Any) -> Any:
    """A worker's index-th piece of work, `(group, first, last, step, slot)`: tiles first, first + step, ... below last.

    What it finds goes to that slot of the partial results. NO_SLOT: no work is left.

    >>> [tuple(map(int, segment(i, 3, workers=4, groups=3, per_round=2, tiles=100))) for i in range(3)]
    [(1, 1, 100, 2, 3), (2, 3, 100, 4, 7), (0, 0, 0, 1, -1)]
    """
    full, share = quotient(groups, per_round), quotient(workers, per_round)
    busy = share * per_round  # workers of a full round
    rest = groups - full * per_round
    if worker < busy:
        if index < full:
            stream = quotient(worker, per_round)
            return _int32s(index * per_round + worker - stream * per_round, stream, tiles, share, index * busy + worker)
        index -= full
    if rest > 0:
        share, head = quotient(workers, rest), shared_tiles(workers, rest, tiles)
        if worker < share * rest:
            if index == 0:
                stream = quotient(worker, rest)
                return _int32s(full * per_round + worker - stream * rest, stream, head, share, full * busy + worker)
        elif head < tiles:
            member = worker - share * rest + index * (workers - share * rest)
            if member < rest:
                return _int32s(full * per_round + member, head, tiles, 1, full * busy + workers + member)
    return _int32s(0, 0, 0, 1, NO_SLOT)


@register_jitable
def slots_of(group: Any, workers: Any, groups: Any, per_round: Any, tiles: Any) -> Any:
    """Where a group's partial results are, `(first, step, count, extra)`: slots first + i * step for i < count, extra if >= 0.

    >>> tuple(map(int, slots_of(2, workers=4, groups=3, per_round=2, tiles=100)))
    (4, 1, 4, -1)
    """
    full, share = quotient(groups, per_round), quotient(workers, per_round)
    busy, rest = share * per_round, groups - full * per_round
    if group < full * per_round:
        round_ = quotient(group, per_round)
        first = round_ * busy + group - round_ * per_round
        return np.int32(first), np.int32(per_round), np.int32(share), np.int32(NO_SLOT)
    member, extra = group - full * per_round, NO_SLOT
    if shared_tiles(workers, rest, tiles) < tiles:
        extra = full * busy + workers + member
    return np.int32(full * busy + member), np.int32(rest), quotient(workers, rest), np.int32(extra)


@register_jitable
def fixed_segment(index: Any, worker: Any, workers: Any, groups: Any, per_round: Any, tiles: Any) -> Any:
    """`segment` of a fixed schedule.

    >>> [tuple(map(int, fixed_segment(i, 3, workers=4, groups=3, per_round=2, tiles=100))) for i in range(2)]
    [(1, 1, 100, 2, 3), (0, 0, 0, 1, -1)]
    """
    share = quotient(workers, per_round)
    stream = quotient(worker, per_round)
    group = index * per_round + worker - stream * per_round
    if stream >= share or group >= groups:
        return _int32s(0, 0, 0, 1, NO_SLOT)
    return _int32s(group, stream, tiles, share, index * (share * per_round) + worker)


@register_jitable
def fixed_slots_of(group: Any, workers: Any, groups: Any, per_round: Any, tiles: Any) -> Any:
    """`slots_of` of a fixed schedule.

    >>> tuple(map(int, fixed_slots_of(2, workers=4, groups=3, per_round=2, tiles=100)))
    (4, 2, 2, -1)
    """
    share, round_ = quotient(workers, per_round), quotient(group, per_round)
    first = round_ * (share * per_round) + group - round_ * per_round
    return np.int32(first), np.int32(per_round), np.int32(share), np.int32(NO_SLOT)


@register_jitable
def shared_tiles(workers: Any, rest: Any, tiles: Any) -> Any:
    """How many tiles the sharing workers of the last round take; those from there on are for the workers left over.

    >>> int(shared_tiles(workers=66, rest=32, tiles=1000))  # 32 groups, 2 workers each; 2 left over have 16 groups each
    970
    """
    share = quotient(workers, rest)
    over = workers - share * rest
    if over == 0:
        return tiles
    turns = quotient(rest + over - 1, over) * share
    return tiles - quotient(tiles, turns + 1)  # tiles * turns / (turns + 1), without a product that could overflow


@register_jitable
def quotient(a: Any, b: Any) -> Any:
    """a // b of small non-negative numbers, by the fast unsigned 32-bit division."""
    return np.int32(np.uint32(a) // np.uint32(b))


@register_jitable
def _int32s(a: Any, b: Any, c: Any, d: Any, e: Any) -> Any:
    """The five numbers as int32."""
    return np.int32(a), np.int32(b), np.int32(c), np.int32(d), np.int32(e)


def count_slots(workers: int, groups: int, per_round: int) -> int:
    """Partial results, at most, of so many groups.

    >>> count_slots(workers=4, groups=3, per_round=2)
    12
    """
    return groups // per_round * (workers // per_round * per_round) + 2 * workers


@functools.cache
def groups_per_round(workers: int, most: int) -> int:
    """How many groups go together, at most `most`: such that the fewest workers are idle; of those, the most.

    >>> groups_per_round(workers=66, most=14), groups_per_round(workers=57, most=14)
    (11, 3)
    """
    return max(range(1, max(1, min(most, workers)) + 1), key=lambda groups: (workers // groups * groups, groups))
