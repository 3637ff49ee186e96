"""The mean over the vocabulary of class weight times logit, which label smoothing under a softcap needs."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import numpy as np

from cce_numba import folds
from cce_numba.cpu.blocks import class_weights
from cce_numba.cpu.folds.fold import Given, Tile


class State(NamedTuple):
    """Of each counting token; and what a step needs."""

    total: Any  # (n_valid,) float64: of class weight times logit
    given: Given


class MeanLogit:
    """The fold."""

    name: ClassVar[str] = folds.MEAN_LOGIT

    def begin(self, given: Given) -> State:
        """See `fold.Fold`."""
        return State(np.zeros(len(given.tokens)), given)

    def step(self, state: State, first_state: Any, tile: Tile) -> None:
        """See `fold.Fold`."""
        state.total[tile.rows] += tile.logits @ class_weights(state.given.problem, tile.columns)

    def merge(self, state: State, later: State) -> State:
        """See `fold.Fold`."""
        return state._replace(total=state.total + later.total)

    def store(self, state: State, first_state: Any, given: Given) -> dict[str, Any]:
        """See `fold.Fold`."""
        mean_logit = np.zeros(given.problem.N, given.problem.compute_dtype)
        mean_logit[given.tokens] = state.total / given.problem.V
        return {"mean_logit": mean_logit}
