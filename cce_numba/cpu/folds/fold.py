"""What a fold is here, and what it is handed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np

from cce_numba.arguments import Problem
from cce_numba.cpu.tiles import CpuTiles


@dataclass(frozen=True, eq=False)
class Given:
    """What a forward has before its tiles, for folds to take what they need.

    Attributes:
        problem: the checked inputs.
        tiles: sizes.
        tokens: (n_valid,) integers, the tokens that count, ascending.
        bound: (N,) of the compute dtype, the largest logit of the token's targets, dot products by themselves, NaN if one is
            out of range; None where no survivors are recorded.
    """

    problem: Problem
    tiles: CpuTiles
    tokens: Any
    bound: Any  # or None

    def of_all_tokens(self, counting: Any) -> Any:
        """(N, ...) of the compute dtype, 0 where ignored, out of (n_valid, ...)."""
        result = np.zeros((self.problem.N, *counting.shape[1:]), self.problem.compute_dtype)
        result[self.tokens] = counting
        return result


class Tile(NamedTuple):
    """Logits of some neighbouring tokens, out of those that count, and of some neighbouring vocabulary entries."""

    logits: Any  # (rows, columns) of the compute dtype
    rows: slice  # which of the counting tokens; all of one block of survivors
    columns: slice  # which vocabulary entries; the first is a multiple of 8


class Fold(Protocol):
    """A state is a record of arrays with a row for each counting token. `first_state` is that of the first fold, `MaxSum`.

    Steps of different blocks of survivors run in different threads at the same time; those of one block follow each other.

    Attributes:
        name: what it is called in `cce_numba/folds.py`.
    """

    name: ClassVar[str]

    def begin(self, given: Given) -> Any:
        """The state before the first tile."""

    def step(self, state: Any, first_state: Any, tile: Tile) -> None:
        """Folds one more tile into the state of its rows."""

    def merge(self, state: Any, later: Any) -> Any:
        """The state of two parts of the vocabulary, the earlier and the later, from the states of each."""

    def store(self, state: Any, first_state: Any, given: Given) -> dict[str, Any]:
        """The results, by their names in `Statistics` or, if they have none there, by the fold's own; (N,) where per token."""
