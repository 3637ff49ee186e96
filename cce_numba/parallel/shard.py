"""Which rows of the classifier a rank has, and how targets are coded where most of them are another rank's.

A problem of a shard has the shard's rows as its `c`, and targets that count from the shard's first entry. Three negative codes
stand for what is no entry of the shard, so that none of them can meet a number of the caller's:

    IGNORED     the caller's `ignore_index`, whatever that is
    ELSEWHERE   an entry of the vocabulary that another rank has. Its logit is -inf here, as of an entry that is not there.
    LOST        no entry of the vocabulary. Its logit is NaN, as everywhere.

So the targets' logits of the whole vocabulary are the largest of those that ranks have, with NaN if one has NaN: a rank that
has the target knows more than -inf, and all ranks agree on what is lost. Kernels need one comparison for it, where they write
NaN for a target that is out of range. Everywhere else a code is only a number that no entry has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cce_numba import interchange
from cce_numba.parallel.bounds import Bounds

IGNORED, ELSEWHERE, LOST = -100, -1, -2


@dataclass(frozen=True, eq=False)
class Shard:
    """The rows that a problem has of a vocabulary.

    Attributes:
        start: the first of them.
        total: entries of the whole vocabulary.
        targets: in the shape of `Problem.targets`, int64, the entries' numbers in the whole vocabulary, and the caller's
            `ignore_index`.
        class_weights: (total,) of the compute dtype, contiguous, those of the whole vocabulary, or None.
        top_k: how many best entries are wanted of the whole vocabulary; the problem's options say how many of the shard.
        bounds: how ranks exchange bounds while they go forward; None where nobody carries arrays between them then.
    """

    start: int
    total: int
    targets: Any  # or None
    class_weights: Any  # or None
    top_k: int
    bounds: Bounds | None = None

    @property
    def of_seed(self) -> int:
        """What is added to the seed of the unbiased filter's draws, so that they go by numbers in the whole vocabulary."""
        return self.start << 32


def coded(targets: Any, start: int, rows: int, total: int, ignore_index: int) -> Any:
    """Targets (any shape, int64) of the whole vocabulary as a shard of `rows` entries from `start` on has them.

    >>> coded(np.array([0, 5, 6, 9, 10, 7]), 5, 2, 10, ignore_index=7)
    array([  -1,    0,    1,   -1,   -2, -100])
    """
    xp: Any = interchange.array_module(targets)
    local = targets - start
    result = xp.where((local >= 0) & (local < rows), local, np.int64(ELSEWHERE))
    result = xp.where((targets >= 0) & (targets < total), result, np.int64(LOST))
    return xp.where(targets == ignore_index, np.int64(IGNORED), result)


def rows_of_rank(total: int, rank: int, size: int) -> tuple[int, int]:
    """`(start, stop)` of a rank's entries, where a vocabulary is split as evenly as it goes, earlier ranks having one more.

    That is how `cut_cross_entropy` splits one. `torch.distributed.tensor` gives earlier ranks more.

    >>> [rows_of_rank(10, rank, 4) for rank in range(4)]
    [(0, 3), (3, 6), (6, 8), (8, 10)]
    """
    each, more = divmod(total, size)
    start = rank * each + min(rank, more)
    return start, start + each + (rank < more)
