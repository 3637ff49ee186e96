"""What becomes of tiles of logits: a kernel is made for a tuple of folds, and runs each of them on every tile.

`cce_numba/folds.py` says what a fold is. Here it is a `fold.Fold`: on the host it says what memory it needs, and for kernels it
makes five device functions. `max_sum.py` is the one to read first. `composed.py` makes one function of those of several folds.

In `forward.lse_kernel` a CTA owns a block of tokens and a part of the vocabulary, called a split:

    begin   all threads make the state of the block's rows: arrays in shared memory
    step    all threads fold a tile of logits into it
    row     the state of one row, as a record of numbers, which goes to global memory, one for each split

In `forward.finish_kernel` a thread owns a token:

    merge   the rows of two splits become one
    store   what the row says is written to the fold's results

The first fold is always `MaxSum`. Others may build on it: functions get the first fold's state beside their own.
"""

from __future__ import annotations

from cce_numba import folds
from cce_numba.arguments import Problem
from cce_numba.simt.folds.entropy import Entropy
from cce_numba.simt.folds.fold import Fold
from cce_numba.simt.folds.max_sum import MaxSum
from cce_numba.simt.folds.mean_logit import MeanLogit
from cce_numba.simt.folds.sum_squares import SumSquares
from cce_numba.simt.folds.survivors import Survivors
from cce_numba.simt.folds.target_logit import TargetLogit
from cce_numba.simt.folds.top_k import TopK

_ALL: tuple[Fold, ...] = MaxSum(), TargetLogit(), MeanLogit(), Entropy(), SumSquares(), TopK(), Survivors()
FOLDS: dict[str, Fold] = {fold.name: fold for fold in _ALL}


def of_problem(p: Problem, record_survivors: bool) -> tuple[Fold, ...]:
    """The folds that a problem's forward runs."""
    chosen = FOLDS | {
        folds.TARGET_LOGIT: TargetLogit(several=p.K is not None, in_shards=p.shard is not None),
        folds.SURVIVORS: Survivors(unbiased=p.options.is_unbiased),
    }
    return tuple(chosen[name] for name in folds.wanted(p, record_survivors))
