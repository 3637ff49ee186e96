"""Who computes which tiles: every worker about as many, and all of them at about the same place in the vocabulary.

A worker is a cluster; a group is the tokens that a cluster takes at a time. Whole rounds come first, in which each worker takes one
group and all of the vocabulary. In the last round there are fewer groups than workers, and several workers share a group: they take
its tiles in turn, not one part each, so that all workers read the same rows of `c` at about the same time (from the L2 cache,
once they have been read), and so that each sees a fair sample of the vocabulary early on, which makes its survivors fewer. Workers
that this leaves over take the last tiles of each group in turn.

How many tokens count is known on the device alone, so kernels call these functions; they are plain Python.
"""

from __future__ import annotations

from typing import Any

from numba.cuda.extending import register_jitable

WHOLE = -1  # in place of a slot: no other worker has tiles of the group
DONE = -2


@register_jitable
def segment(index: Any, worker: Any, workers: Any, groups: Any, tiles: Any) -> Any:
    """A worker's index-th piece of work: `(group, first, last, step, slot)`: tiles first, first + step, ... below last.

    What it finds goes to a slot of the partial results, or is the whole result, if slot is WHOLE. Slot DONE: no work is left.

    >>> [segment(i, worker=3, workers=4, groups=5, tiles=100) for i in range(3)]
    [(3, 0, 100, 1, -1), (4, 3, 100, 4, 3), (0, 0, 0, 1, -2)]
    """
    full = groups // workers
    rest = groups - full * workers
    if index < full:
        return index * workers + worker, 0, tiles, 1, WHOLE
    if rest > 0:
        share = workers // rest
        head = shared_tiles(workers, rest, tiles)
        if worker < share * rest:
            if index == full:
                return full * workers + worker % rest, worker // rest, head, share, worker
        elif head < tiles:
            member = worker - share * rest + (index - full) * (workers - share * rest)
            if member < rest:
                return full * workers + member, head, tiles, 1, workers + member
    return 0, 0, 0, 1, DONE


@register_jitable
def shared_tiles(workers: Any, rest: Any, tiles: Any) -> Any:
    """How many tiles the sharing workers of the last round take; those from there on are for the workers left over.

    >>> shared_tiles(workers=66, rest=32, tiles=1000)  # 32 groups, 2 workers each; 2 left over have 16 groups each
    969
    """
    share = workers // rest
    over = workers - share * rest
    if over == 0:
        return tiles
    turns = (rest + over - 1) // over
    return tiles * turns * share // (turns * share + 1)
