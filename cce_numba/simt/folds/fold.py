"""What a fold is here: `Fold` on the host, `Functions` in kernels, and the records that the functions are handed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np

from cce_numba.arguments import Problem
from cce_numba.simt.records import Tokens
from cce_numba.simt.tiles import SimtTiles


class Block(NamedTuple):
    """The block of tokens that a CTA owns."""

    tokens: Any  # records.Tokens
    n0: Any  # position, in the list of tokens, of its first row; rows beyond the last token repeat that
    continues: Any  # bool: the results hold what the tiles of earlier launches have given
    split: Any  # int: the number of the CTA's split


class Tile(NamedTuple):
    """A tile of logits, spread over the registers of the CTA's threads."""

    logits: (
        Any  # (thread_n, thread_v) real: row threadIdx.y * thread_n + i, column product.column_of(j); -inf past the last entry
    )
    n_block: Any  # its block of tokens
    v0: Any  # its first vocabulary entry
    V: Any  # vocabulary entries
    partial: Any  # (threads_v, block_n) real in shared memory, for use within a step: a number of each thread and row


class Place(NamedTuple):
    """What a thread of the finishing kernel stores results of."""

    token: Any  # its number
    exists: Any  # bool: it is not one of the rows beyond the last token, which repeat that
    r: Any  # its row within the block
    n_block: Any  # the block
    V: Any  # vocabulary entries
    position: Any  # the token's place in the list
    splits: Any  # int: how many have found something


class Functions(NamedTuple):
    """A fold's device functions. `arrays` are what `Fold.arrays` made. Names with `first_` are of the first fold, `MaxSum`.

    All threads of a CTA call begin, step and store together, so these may have barriers. When a step begins, no thread reads
    the shared memory of this fold or `Tile.partial`, so all may write; it ends with a barrier.
    """

    begin: Any  # state = begin(arrays, first_arrays, block: Block): a record of arrays in shared memory
    step: Any  # step(state, first_state, arrays, tile: Tile)
    row: Any  # row = row(state, r): the state of the block's r-th row, as a `Fold.Row`
    merge: Any  # row = merge(row, later_row): of two parts of the vocabulary
    store: Any  # store(row, first_row, arrays, place: Place)


@dataclass(frozen=True, eq=False)
class Given:
    """What a forward has before its tiles, for folds to take what they need.

    Attributes:
        problem: the checked inputs.
        tiles: sizes.
        tokens: those that count.
        targets: (N, K) int64, or None without targets.
        bound: (N,) of the compute dtype, the largest logit of the token's targets, dot products by themselves, NaN if one is
            out of range; None where no survivors are recorded.
        splits: how many CTAs share a block of tokens, in all launches together.
        draw_seed: (1,) int64, of the draws of the unbiased filter; None without it.
    """

    problem: Problem
    tiles: SimtTiles
    tokens: Tokens
    targets: Any  # or None
    bound: Any  # or None
    draw_seed: Any  # or None
    splits: int


class Fold(Protocol):
    """A frozen dataclass, since kernels are told apart by the folds that they are made for.

    Attributes:
        name: what it is called in `folds.py`.
        Row: makes the record of a row's state out of numbers; None if a row has nothing that must be merged.
    """

    name: ClassVar[str]
    Row: ClassVar[Any]

    def row_dtypes(self, real: np.dtype) -> tuple[np.dtype, ...]:
        """The dtypes of the fields of `Row`, for logits of dtype `real`."""

    def arrays(self, given: Given) -> Any:
        """A record of what its functions take: inputs, and results in fresh memory, 0 for tokens that are ignored."""

    def results(self, arrays: Any) -> dict[str, Any]:
        """Those of its arrays that are results, by their names in `Statistics` or, if they have none there, by its own name."""

    def functions(self, tiles: SimtTiles, real: np.dtype) -> Functions:
        """Its device functions, for logits of dtype `real`."""
