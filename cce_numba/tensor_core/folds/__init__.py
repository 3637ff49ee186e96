"""Folds of the tensor-core kernels: what becomes of a tile of logits in registers. See `cce_numba.folds` for what a fold is.

A warp holds 16 rows of a tile, a lane two of them (`ptx.fragment`), and four lanes share a row. A consumer warpgroup folds half
a tile of 128 rows at a time: a *pair* of rows of each lane. So a fold made for tiles of n columns is these device functions:

    begin(rows, found, at)                      the state of a pair of rows; rows: `RowPair`, found: `records.Found`
    step(state, z, tile, lse, found, at)        the state after half a tile z, a fragment of n columns, -inf past the end of
                                                the vocabulary; tile: `Tile`; lse: about the pair's natural log-sum-exp so
                                                far, with this tile
    numbers(state)                              `(numbers of row 0, numbers of row 1)`, each a tuple of `Fold.numbers` float32:
                                                what other workers need to know
    nothing()                                   such a tuple for a row of which nothing has been seen
    merge(numbers, numbers)                     such a tuple for what both have seen; in which order does not matter
    store(numbers, lse, row, found, survivors, at)   by all lanes of a warp: writes what the numbers say of a token; row: `Row`

Where workers tell each other nothing, since what the fold finds is in memory at once, `chain.NOTHING_TO_TELL` has `numbers`,
`nothing` and `merge`.

`at` is the place of the fold's first result in `Found.results`. The vocabulary may come in several launches, each of which
stores results. In a launch after the first, `begin` goes on from these where `rows.resumes` says so: then one worker has what
all have found, and the others begin with nothing. A step may use the named barrier 2 + `tile.consumer`, for the 128 threads of
the consumer.

A fold whose sums are of exponentials with the largest logit taken out builds on `max_sum`, which knows that. It has, in place
of step, merge and store,

    step_beside(state, z, beside)               beside: what `max_sum` has of the pair, `chain.Beside`
    merge_beside(numbers, numbers, first, first)    first: the numbers of `max_sum` of each
    store_beside(numbers, first, row, found, at)

`chain` makes one fold of several: the first is `max_sum`, which gives the others the log-sum-exp by two functions more,
`lse_of_state` and `lse_of_numbers`. A fold that needs no log-sum-exp may stand alone (`divergence`).
"""

from __future__ import annotations

from cce_numba.folds import DIVERGENCE
from cce_numba.tensor_core.folds.chain import Fold, Row, RowPair, Tile, chain, number_count, result_names
from cce_numba.tensor_core.folds.divergence import divergence_of
from cce_numba.tensor_core.folds.entropy import ENTROPY
from cce_numba.tensor_core.folds.group_maxima import GROUP_MAXIMA
from cce_numba.tensor_core.folds.kept_logits import KEPT_LOGITS
from cce_numba.tensor_core.folds.max_sum import MAX_SUM
from cce_numba.tensor_core.folds.mean_logit import MEAN_LOGIT
from cce_numba.tensor_core.folds.several_targets import SEVERAL_TARGET_LOGITS
from cce_numba.tensor_core.folds.sum_squares import SUM_SQUARES
from cce_numba.tensor_core.folds.survivors import SURVIVORS, SURVIVORS_BY_CHANCE
from cce_numba.tensor_core.folds.target_logit import TARGET_LOGIT
from cce_numba.tensor_core.records import Found, FoundOfHeads, FoundOfMore

FOLDS = {
    fold.name: fold for fold in (MAX_SUM, TARGET_LOGIT, MEAN_LOGIT, ENTROPY, SUM_SQUARES, GROUP_MAXIMA, SURVIVORS, KEPT_LOGITS)
}


def found_class(folds: tuple[Fold, ...]) -> type:
    """The record of what is found that kernels with these folds take: `Found`, `FoundOfMore` or `FoundOfHeads` of `records`."""
    if any(fold.name == DIVERGENCE for fold in folds):
        return FoundOfHeads
    return FoundOfMore if SEVERAL_TARGET_LOGITS in folds or GROUP_MAXIMA in folds else Found


__all__ = [
    "ENTROPY",
    "FOLDS",
    "GROUP_MAXIMA",
    "KEPT_LOGITS",
    "MAX_SUM",
    "MEAN_LOGIT",
    "SEVERAL_TARGET_LOGITS",
    "SUM_SQUARES",
    "SURVIVORS",
    "SURVIVORS_BY_CHANCE",
    "TARGET_LOGIT",
    "Fold",
    "Row",
    "RowPair",
    "Tile",
    "chain",
    "divergence_of",
    "found_class",
    "number_count",
    "result_names",
]
