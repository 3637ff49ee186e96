"""The two halves of a forward for those who carry the numbers between ranks themselves: `forward_shard` and `merge`.

All shards of a vocabulary may also be in one process, on one device after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Unpack

from cce_numba import driver, interchange
from cce_numba.arguments import GRADIENTS, Rows
from cce_numba.driver import Partial
from cce_numba.interchange import ReadAgain
from cce_numba.loss import Result
from cce_numba.options import LossOptions, integer


@dataclass(frozen=True, eq=False)
class ShardResult:
    """What `forward_shard` found, and what `merge` needs.

    Attributes:
        packed: (bytes,) uint8, an array of e's kind: the numbers that every other rank needs. 12 bytes a token for 16-bit and
            float32 inputs, and 4 more for each of label smoothing, entropy and sum of squares.
    """

    packed: Any
    _partial: Partial
    _read_again: tuple[ReadAgain, ReadAgain]


def forward_shard(
    e: Any, c: Any, targets: Any, *, vocab_start: int, vocab_size: int, **options: Unpack[LossOptions]
) -> ShardResult:
    """The forward of a rank that has some rows of the classifier, up to where ranks must tell each other what they found.

    Args:
        e: (..., D) embeddings, the same on all ranks, as in `linear_cross_entropy`.
        c: (rows, D) the rows of the entries from `vocab_start` on; there may be none.
        targets: (...) integers in [0, vocab_size), the same on all ranks.
        vocab_start: the first entry of this rank.
        vocab_size: entries of the whole vocabulary.
        options: those of `linear_cross_entropy`, the same on all ranks. A bias is (rows,), of this rank's entries; class
            weights are (vocab_size,), of all.

    Raises what `linear_cross_entropy` does.

    >>> import numpy as np
    >>> e, c, targets = np.zeros((2, 4)), np.ones((8, 4)), np.array([1, 6])
    >>> parts = [forward_shard(e, c[a:b], targets, vocab_start=a, vocab_size=8) for a, b in ((0, 3), (3, 8))]
    >>> results = [merge(part, [other.packed for other in parts]) for part in parts]
    >>> [round(float(result.loss), 4) for result in results]
    [2.0794, 2.0794]
    """
    rows = Rows(integer("vocab_start", vocab_start), integer("vocab_size", vocab_size))
    with driver.prepared(e, c, targets, options, rows=rows) as (problem, plan):
        partial = Partial.of(problem.with_own_small_arrays(), plan, GRADIENTS)
        return ShardResult(problem.kind.export(partial.packed()), partial, (ReadAgain("e", e), ReadAgain("c", c)))


def merge(own: ShardResult, packed: Sequence[Any]) -> Result:
    """The result of the whole vocabulary, out of what all ranks have found: the loss is the same on all, bit by bit.

    Args:
        own: what `forward_shard` returned on this rank.
        packed: the `packed` arrays of all ranks, in the order of their entries, this rank's included; or one array of them,
            (ranks, bytes).

    `backward` of the result gives the gradients of this rank's rows of `c` and `bias`, and its part of the gradient of `e`.
    The sum of all ranks' parts is the gradient of `e`; with `accum_e_fp32=True` it is rounded by whoever sums. What
    `survivor_counts` and `dropped_mass` say is of this rank's entries.

    Raises ValueError if the arrays are not those of the same tokens and options.
    """
    partial = own._partial
    problem = partial.problem
    with problem.kind.current():
        every = [interchange.take("packed", array) for array in packed]
        return Result.of(partial.merged(every, None), own._read_again)
