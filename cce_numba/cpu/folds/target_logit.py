"""The targets' logits of each token, as they stand in their tiles: rounded as all are, so their differences keep digits."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import numpy as np

from cce_numba import folds
from cce_numba.cpu.folds.fold import Given, Tile
from cce_numba.parallel.shard import ELSEWHERE


class State(NamedTuple):
    """Of each target of each counting token, (n_valid, K); K is 1 where targets are (N,)."""

    target: Any  # int64
    # Of the compute dtype; NaN as long as the target's tile has not come, and for one out of range for ever; -inf for one that
    # another rank has.
    logit: Any


class TargetLogit:
    """The fold."""

    name: ClassVar[str] = folds.TARGET_LOGIT

    def begin(self, given: Given) -> State:
        """See `fold.Fold`."""
        p = given.problem
        targets = p.targets[given.tokens].reshape(len(given.tokens), p.K or 1)
        elsewhere = p.shard is not None and targets == ELSEWHERE
        return State(targets, np.where(elsewhere, -np.inf, np.full(targets.shape, np.nan, p.compute_dtype)))

    def step(self, state: State, first_state: Any, tile: Tile) -> None:
        """See `fold.Fold`."""
        column = state.target[tile.rows] - tile.columns.start
        row, k = np.nonzero((column >= 0) & (column < tile.logits.shape[1]))
        state.logit[tile.rows.start + row, k] = tile.logits[row, column[row, k]]

    def merge(self, state: State, later: State) -> State:
        """See `fold.Fold`. A token's target is in one part of the vocabulary."""
        return state._replace(logit=np.where(np.isnan(state.logit), later.logit, state.logit))

    def store(self, state: State, first_state: Any, given: Given) -> dict[str, Any]:
        """See `fold.Fold`. Padding may be a number that is an entry, too: what it found is not wanted."""
        padding = state.target == given.problem.options.ignore_index
        logit = given.of_all_tokens(np.where(padding, 0, state.logit))
        return {"target_logit": logit[:, 0] if given.problem.K is None else logit}
