"""What becomes of tiles of logits: the forward runs each fold of a tuple on every tile, while the tile is in the cache.

`cce_numba/folds.py` says what a fold is, `fold.py` how it looks here. `max_sum.py` is the one to read first. The first fold is
always `MaxSum`. Others may build on it: functions get the first fold's state beside their own.

On the CPU one worker sees all tiles of a row, so the forward merges nothing. Folds can `merge` all the same, as everywhere: it
is how what several processes have found of a vocabulary that they share becomes one.
"""

from __future__ import annotations

from cce_numba import folds
from cce_numba.arguments import Problem
from cce_numba.cpu.folds.entropy import Entropy
from cce_numba.cpu.folds.fold import Fold
from cce_numba.cpu.folds.max_sum import MaxSum
from cce_numba.cpu.folds.mean_logit import MeanLogit
from cce_numba.cpu.folds.sum_squares import SumSquares
from cce_numba.cpu.folds.survivors import Survivors
from cce_numba.cpu.folds.target_logit import TargetLogit
from cce_numba.cpu.folds.top_k import TopK

_ALL: tuple[Fold, ...] = MaxSum(), TargetLogit(), MeanLogit(), Entropy(), SumSquares(), TopK(), Survivors()
FOLDS: dict[str, Fold] = {fold.name: fold for fold in _ALL}


def of_problem(p: Problem, record_survivors: bool) -> tuple[Fold, ...]:
    """The folds that a problem's forward runs."""
    return tuple(FOLDS[name] for name in folds.wanted(p, record_survivors))
