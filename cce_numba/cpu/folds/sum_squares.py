"""The sum of squared probabilities: the sum of exp(y)**2, with y = logit - largest. See `cce_numba/folds.py`."""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

import numpy as np

from cce_numba import folds
from cce_numba.cpu.compiled import compiled
from cce_numba.cpu.elements import exp, rounded
from cce_numba.cpu.folds.fold import Given, Tile
from cce_numba.cpu.folds.max_sum import State as MaxSumState

_ZERO = np.float32(0)


class State(NamedTuple):
    """Of each counting token, (n_valid,) float64."""

    largest: Any  # what `MaxSum` had after the last tile
    total: Any  # of exp(y)**2


class SumSquares:
    """The fold."""

    name: ClassVar[str] = folds.SUM_SQUARES

    def begin(self, given: Given) -> State:
        """See `fold.Fold`."""
        n_valid = len(given.tokens)
        return State(np.full(n_valid, -np.inf), np.zeros(n_valid))

    def step(self, state: State, first_state: MaxSumState, tile: Tile) -> None:
        """See `fold.Fold`. The first fold has taken this tile already."""
        rows = tile.rows
        _fold_rows(tile.logits, first_state.largest[rows], state.largest[rows], state.total[rows])

    def merge(self, state: State, later: State) -> State:
        """See `fold.Fold`."""
        largest = np.maximum(state.largest, later.largest)
        shift = np.where(largest == -np.inf, 0, largest)
        return State(largest, sum(part.total * np.exp(part.largest - shift) ** 2 for part in (state, later)))

    def store(self, state: State, first_state: MaxSumState, given: Given) -> dict[str, Any]:
        """See `fold.Fold`. NaN where the log-sum-exp is NaN, or all logits are -inf."""
        return {"sum_squares": given.of_all_tokens(state.total / first_state.sum**2)}


@compiled(nogil=True, fastmath={"reassoc", "contract"})
def _sum_squared_exp(row: Any, shift: Any) -> Any:
    """Sum of exp(row - shift)**2, in the dtype of the row."""
    total = shift * _ZERO + _ZERO
    for v in range(row.shape[0]):
        p = exp(row[v] - shift)
        total += p * p
    return total


@compiled(nogil=True)
def _fold_rows(z: Any, new_largest: Any, largest: Any, total: Any) -> None:
    """Folds logits z (n, v) into the state; the other arrays are (n,) float64. The first has these logits in it."""
    for n in range(z.shape[0]):
        new = new_largest[n]
        shift = 0.0 if new == -np.inf else new  # exp(-inf - 0) is 0, where exp(-inf - -inf) is NaN
        weight = math.exp(largest[n] - shift)
        total[n] = total[n] * weight * weight + np.float64(_sum_squared_exp(z[n], rounded(shift, z)))
        largest[n] = new
