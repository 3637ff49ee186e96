"""The target's logit of each token, as it stands in its tile: rounded as the others are, so their differences keep digits."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import numpy as np

from cce_numba import folds
from cce_numba.cpu.folds.fold import Given, Tile


class State(NamedTuple):
    """Of each counting token, (n_valid,)."""

    target: Any  # int64
    logit: Any  # of the compute dtype; NaN as long as the target's tile has not come, and for one out of range for ever


class TargetLogit:
    """The fold."""

    name: ClassVar[str] = folds.TARGET_LOGIT

    def begin(self, given: Given) -> State:
        """See `fold.Fold`."""
        p = given.problem
        return State(p.targets[given.tokens], np.full(len(given.tokens), np.nan, p.compute_dtype))

    def step(self, state: State, first_state: Any, tile: Tile) -> None:
        """See `fold.Fold`."""
        column = state.target[tile.rows] - tile.columns.start
        row = np.flatnonzero((column >= 0) & (column < tile.logits.shape[1]))
        state.logit[tile.rows.start + row] = tile.logits[row, column[row]]

    def merge(self, state: State, later: State) -> State:
        """See `fold.Fold`. A token's target is in one part of the vocabulary."""
        return state._replace(logit=np.where(np.isnan(state.logit), later.logit, state.logit))

    def store(self, state: State, first_state: Any, given: Given) -> dict[str, Any]:
        """See `fold.Fold`."""
        return {"target_logit": given.of_all_tokens(state.logit)}
