"""The online log-sum-exp: each row's largest logit so far, and the sum of exp(logit - largest) (paper section 4.2)."""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

import numpy as np

from cce_numba import folds
from cce_numba.cpu.compiled import compiled
from cce_numba.cpu.elements import exp, rounded
from cce_numba.cpu.folds.fold import Given, Tile

_ZERO = np.float32(0)


class State(NamedTuple):
    """Of each counting token, (n_valid,) float64."""

    largest: Any  # -inf as long as there is no larger logit; NaN is in no maximum
    sum: Any  # of exp(logit - largest); NaN if a logit is

    def log_sum_exp(self) -> Any:
        """(n_valid,) natural log: -inf where all logits are -inf, NaN where one is NaN."""
        return np.log(self.sum) + np.where(self.largest == -np.inf, 0, self.largest)


class MaxSum:
    """The fold."""

    name: ClassVar[str] = folds.MAX_SUM

    def begin(self, given: Given) -> State:
        """See `fold.Fold`."""
        n_valid = len(given.tokens)
        return State(largest=np.full(n_valid, -np.inf), sum=np.zeros(n_valid))

    def step(self, state: State, first_state: Any, tile: Tile) -> None:
        """See `fold.Fold`."""
        z = tile.logits
        _fold_rows(z, z.max(axis=1), state.largest[tile.rows], state.sum[tile.rows])

    def merge(self, state: State, later: State) -> State:
        """See `fold.Fold`."""
        largest = np.maximum(state.largest, later.largest)
        shift = np.where(largest == -np.inf, 0, largest)  # exp(-inf - 0) is 0, where exp(-inf - -inf) is NaN
        total = state.sum * np.exp(state.largest - shift) + later.sum * np.exp(later.largest - shift)
        return State(largest, total)

    def store(self, state: State, first_state: Any, given: Given) -> dict[str, Any]:
        """See `fold.Fold`."""
        results = {"lse": state.log_sum_exp(), "max_logit": state.largest, "log_sum": np.log(state.sum)}
        return {name: given.of_all_tokens(result) for name, result in results.items()}


@compiled(nogil=True, fastmath={"reassoc", "contract"})
def _sum_exp(row: Any, shift: Any) -> Any:
    """Sum of exp(row - shift), in the dtype of the row."""
    total = shift * _ZERO + _ZERO
    for v in range(row.shape[0]):
        total += exp(row[v] - shift)
    return total


@compiled(nogil=True)
def _fold_rows(z: Any, tile_max: Any, largest: Any, total: Any) -> None:
    """Folds logits z (n, v), whose rows have the maxima tile_max (n,), into largest and total, (n,) float64."""
    for n in range(z.shape[0]):
        old_max, new_max = largest[n], np.float64(tile_max[n])
        if not new_max > old_max:  # nor for a NaN, which is in the sum anyway
            new_max = old_max
        shift = 0.0 if new_max == -np.inf else new_max  # exp(-inf - 0) is 0, where exp(-inf - -inf) is NaN
        total[n] = total[n] * math.exp(old_max - shift) + np.float64(_sum_exp(z[n], rounded(shift, z)))
        largest[n] = new_max
