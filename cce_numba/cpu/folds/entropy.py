"""The entropy: beside the sum of exp(y), with y = logit - largest, the sum of exp(y) * y. See `cce_numba/folds.py`."""

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
    """Of each counting token, (n_valid,) float64: what was seen up to the last tile, when `MaxSum` had `largest` and `sum`."""

    largest: Any
    sum: Any
    total: Any  # of exp(y) * y, where y is a logit less `largest`

    def of_larger(self, largest: Any) -> Any:
        """(n_valid,) the total with another largest logit, no smaller than that of the state."""
        return _rescaled(self.total, self.sum, self.largest, largest)


class Entropy:
    """The fold."""

    name: ClassVar[str] = folds.ENTROPY

    def begin(self, given: Given) -> State:
        """See `fold.Fold`."""
        n_valid = len(given.tokens)
        return State(np.full(n_valid, -np.inf), np.zeros(n_valid), np.zeros(n_valid))

    def step(self, state: State, first_state: MaxSumState, tile: Tile) -> None:
        """See `fold.Fold`. The first fold has taken this tile already."""
        _fold_rows(tile.logits, *(x[tile.rows] for x in (first_state.largest, first_state.sum, *state)))

    def merge(self, state: State, later: State) -> State:
        """See `fold.Fold`."""
        largest = np.maximum(state.largest, later.largest)
        total = state.of_larger(largest) + later.of_larger(largest)
        return State(largest, _summed(state, largest) + _summed(later, largest), total)

    def store(self, state: State, first_state: MaxSumState, given: Given) -> dict[str, Any]:
        """See `fold.Fold`. NaN where the log-sum-exp is NaN, or all logits are -inf."""
        entropy = np.log(first_state.sum) - state.total / first_state.sum
        return {"entropy": given.of_all_tokens(entropy)}


def _summed(state: State, largest: Any) -> Any:
    """(n_valid,) the sum of exp(y) with another largest logit."""
    return np.where(state.largest == -np.inf, 0, state.sum * np.exp(state.largest - largest))


@compiled(nogil=True)
def _rescaled_number(total: Any, seen: Any, old: Any, new: Any) -> Any:
    """The sum of exp(y) * y for a new largest logit, of logits that are as good as none where the old one is -inf."""
    result = 0.0
    if old != -math.inf:
        less = old - new
        result = math.exp(less) * (total + less * seen)
    return result


def _rescaled(total: Any, seen: Any, old: Any, new: Any) -> Any:
    less = np.where(old == -np.inf, 0, old - new)
    return np.where(old == -np.inf, 0, np.exp(less) * (total + less * seen))


@compiled(nogil=True, fastmath={"reassoc", "contract"})
def _sum_exp_times(row: Any, shift: Any) -> Any:
    """Sum of exp(y) * y, y = row - shift, in the dtype of the row; an exp(y) of 0 adds 0, if y is -inf."""
    total = shift * _ZERO + _ZERO
    for v in range(row.shape[0]):
        y = row[v] - shift
        p = exp(y)
        total += p * (y if p > _ZERO else _ZERO)
    return total


@compiled(nogil=True)
def _fold_rows(z: Any, new_largest: Any, new_sum: Any, largest: Any, seen: Any, total: Any) -> None:
    """Folds logits z (n, v) into the state; the other arrays are (n,) float64. The first two have these logits in them."""
    for n in range(z.shape[0]):
        new = new_largest[n]
        shift = 0.0 if new == -np.inf else new  # exp(-inf - 0) is 0, where exp(-inf - -inf) is NaN
        old_part = _rescaled_number(total[n], seen[n], largest[n], new)
        total[n] = old_part + np.float64(_sum_exp_times(z[n], rounded(shift, z)))
        largest[n], seen[n] = new, new_sum[n]
