"""The k largest logits and their entries: by descending logit, and by ascending entry where logits are equal."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import numpy as np

from cce_numba import folds
from cce_numba.cpu.compiled import compiled
from cce_numba.cpu.folds.fold import Given, Tile


class State(NamedTuple):
    """Of each counting token."""

    logits: Any  # (n_valid, k) of the compute dtype: the best of those seen so far, in order
    ids: Any  # (n_valid, k) int64: their entries
    count: Any  # (n_valid,) int64: how many there are; all k once k entries have been seen


class TopK:
    """The fold. Tiles come by ascending entry, so an equal logit that comes later goes behind."""

    name: ClassVar[str] = folds.TOP_K

    def begin(self, given: Given) -> State:
        """See `fold.Fold`."""
        p, n_valid = given.problem, len(given.tokens)
        shape = n_valid, p.options.top_k
        return State(np.full(shape, -np.inf, p.compute_dtype), np.zeros(shape, np.int64), np.zeros(n_valid, np.int64))

    def step(self, state: State, first_state: Any, tile: Tile) -> None:
        """See `fold.Fold`."""
        _insert_rows(tile.logits, tile.columns.start, *(x[tile.rows] for x in state))

    def merge(self, state: State, later: State) -> State:
        """See `fold.Fold`."""
        k = state.logits.shape[1]
        logits, ids = (np.concatenate(pair, axis=1) for pair in zip(state[:2], later[:2], strict=True))
        place, seen = np.arange(k), (state.count[:, None], later.count[:, None])
        missing = np.concatenate([place >= count for count in seen], axis=1)
        order = np.lexsort((ids, -logits, missing), axis=1)[:, :k]
        logits, ids = (np.take_along_axis(x, order, axis=1) for x in (logits, ids))
        return State(logits, ids, np.minimum(state.count + later.count, k))

    def store(self, state: State, first_state: Any, given: Given) -> dict[str, Any]:
        """See `fold.Fold`."""
        shape = given.problem.N, state.logits.shape[1]
        logits, ids = np.zeros(shape, state.logits.dtype), np.zeros(shape, np.int64)
        logits[given.tokens], ids[given.tokens] = state.logits, state.ids
        return {"top_logits": logits, "top_ids": ids}


@compiled(nogil=True)
def _insert_rows(z: Any, v0: int, logits: Any, ids: Any, count: Any) -> None:
    """Puts the logits z (n, v) of the entries from v0 on where they belong in logits and ids (n, k); count is (n,)."""
    k = logits.shape[1]
    for n in range(z.shape[0]):
        row, best, entries, have = z[n], logits[n], ids[n], count[n]
        for v in range(row.shape[0]):
            x = row[v]
            if have < k or x > best[k - 1]:
                place = min(have, k - 1)
                while place > 0 and x > best[place - 1]:
                    best[place], entries[place] = best[place - 1], entries[place - 1]
                    place -= 1
                best[place], entries[place] = x, v0 + v
                have = min(have + 1, k)
        count[n] = have
