"""The survey's tables: what each holds, its number format and shape, and its place in one allocation."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from cce_numba.integers import ceil_div
from cce_numba.launch.kernel import pointer_to
from cce_numba.launch.record import Record
from cce_numba.survivors import SURVIVOR_BLOCK
from cce_numba.tensor_core.records import I32, I64

COLUMN_TILE = 128  # sorted columns of a tile
LIST_TILE = 192  # columns of a list whose logits a job computes again
K_STEP = 64  # terms of a sum in a stage
_EVEN_TILES = math.lcm(LIST_TILE, COLUMN_TILE) // COLUMN_TILE  # tiles that a whole number of jobs' lists fills
KEY_BITS = 8  # a column's key says for which eighths of the blocks dC needs the column (`keys.key_of`)
KEYS = 2**KEY_BITS
CHUNK = 4096  # columns that a CTA sorts
_ALIGNMENT_BYTES = 256


class Table(NamedTuple):
    """A field of `Tables`: the address of an array.

    Attributes:
        dtype: of its numbers.
        shape: its shape, for given sizes.
    """

    dtype: Any
    shape: Callable[[SurveyLayout], tuple[int, ...]]

    @property
    def kind(self) -> Any:
        """The numba type of the address."""
        return pointer_to(self.dtype)


def tiles_of_dense_round(cap: Any, blocks: Any) -> Any:
    """Tiles of columns in a round of at most `cap` pairs in which all columns survive in so many blocks.

    A whole number of lists of LIST_TILE columns fills them, if they are at least three, so no job computes columns for nothing.
    Kernels compile this function as well.

    >>> tiles_of_dense_round(64 * 1300, 64), tiles_of_dense_round(64 * 300, 64)
    (9, 2)
    """
    tiles = cap // (blocks * COLUMN_TILE)
    return max(1, tiles if tiles < _EVEN_TILES else tiles // _EVEN_TILES * _EVEN_TILES)


class Sizes(Record):
    """How large a survey's tables are."""

    blocks = I32  # blocks of 128 listed tokens, at most
    block_words = I32  # 32-bit words with a bit for each block
    V = I32  # columns: vocabulary entries
    column_tiles = I32  # tiles of 128 sorted columns
    cap = I64  # surviving pairs at which a round is cut
    rounds_max = I32  # rounds, at most
    # The same in a dense problem, by the round's buffer: one of three, if dE is not wanted; one of two; or one of two in
    # borrowed memory, 0 if there is none.
    dense_cap = I64
    large_cap = I64
    borrowed_cap = I64
    borrowed_tiles = I32  # tiles that rounds in borrowed memory may have together


class Tables(Record):
    """Addresses of what a survey makes. The words are those of the package's guide; j numbers sorted columns, t their tiles."""

    # Of tokens: four numbers of each listed token. They are softmax_weight * weight_scale[0] divided by the token's sum of
    # exponentials (`exponentials`), target_weight * weight_scale[0], the shift of these exponentials, and, as the bits of an
    # int32, the target, -1 for none.
    rows = Table(np.float32, lambda s: (s.blocks * SURVIVOR_BLOCK, 4))
    # Of each listed token, the base-2 logarithm of the sum of 2^(log2(e) * z - shift) over its logits z; NaN if it is lost.
    log_sums = Table(np.float32, lambda s: (s.blocks * SURVIVOR_BLOCK,))
    row_of = Table(np.int32, lambda s: (s.blocks * SURVIVOR_BLOCK,))  # row of e of each listed token, -1 if it has no weight
    whole = Table(np.uint32, lambda s: (s.block_words,))  # bit b: block b is whole
    active = Table(np.uint32, lambda s: (s.block_words,))  # bit b: block b is active
    weight_scale = Table(np.float32, lambda s: (2,))  # the power of two that weights are multiplied by, and its inverse

    # Of columns.
    order = Table(np.int32, lambda s: (s.column_tiles * COLUMN_TILE,))  # vocabulary entry of sorted column j, -1 past the last
    dense = Table(np.int32, lambda s: (1,))  # 1 if the survey is dense, else 0
    bits = Table(np.uint32, lambda s: (s.blocks, s.column_tiles * COLUMN_TILE // 32))  # bit j & 31 of word j >> 5: j survives
    needed = Table(np.uint32, lambda s: (s.column_tiles, s.block_words))  # bit b: dC needs tile t for block b
    before = Table(np.int32, lambda s: (s.blocks, s.column_tiles + 1))  # columns of tiles before t that survive in the block
    n_live_tiles = Table(np.int32, lambda s: (1,))  # live tiles; they are the first

    # Of rounds.
    n_rounds = Table(np.int32, lambda s: (1,))  # at least 1
    n_borrowed = Table(np.int32, lambda s: (1,))  # rounds whose G is in borrowed memory; they are the first
    first_tile = Table(np.int32, lambda s: (s.rounds_max + 1,))  # of each round; n_live_tiles after the last round
    first_slot = Table(np.int32, lambda s: (s.rounds_max, s.blocks + 1))  # of a block's list in its round, a multiple of 64
    first_job = Table(np.int32, lambda s: (s.rounds_max, s.blocks + 1))  # of a block's list in G(r); the end of all is even
    d_tiles_e = Table(np.int32, lambda s: (1,))  # jobs that dE takes for each block in a round; 0 if others compute dE
    phase_end = Table(np.int32, lambda s: (2 * s.rounds_max,))  # jobs of all phases up to each phase's end

    # What only the survey itself reads.
    n_active = Table(np.int32, lambda s: (1,))  # active blocks
    keys = Table(np.uint8, lambda s: (s.chunks * CHUNK,))  # of each vocabulary entry
    key_counts = Table(np.int32, lambda s: (s.chunks, KEYS))  # columns of each chunk that have the key
    pairs = Table(np.int64, lambda s: (s.chunks,))  # surviving pairs of each chunk
    tile_pairs = Table(np.int32, lambda s: (s.column_tiles,))  # surviving pairs of each tile


@dataclass(frozen=True)
class SurveyLayout:
    """Sizes of the tables, and their places in one allocation.

    Attributes:
        N: tokens.
        V: vocabulary entries.
        cap: surviving (block, column) pairs at which a round is cut, at least those of one tile.
        dense_cap, large_cap, borrowed_cap, borrowed_tiles: as in `Sizes`; the first two are at least cap.
    """

    N: int
    V: int
    cap: int
    dense_cap: int
    large_cap: int
    borrowed_cap: int = 0
    borrowed_tiles: int = 0

    def __post_init__(self) -> None:
        if self.cap < max(1, self.blocks * COLUMN_TILE):
            raise ValueError(f"cap must be at least the {self.blocks * COLUMN_TILE} pairs of a tile, got {self.cap}")

    @property
    def blocks(self) -> int:
        """Blocks of tokens, at most."""
        return ceil_div(self.N, SURVIVOR_BLOCK)

    @property
    def block_words(self) -> int:
        """32-bit words with a bit for each block."""
        return ceil_div(self.blocks, 32)

    @property
    def column_tiles(self) -> int:
        """Tiles of sorted columns."""
        return ceil_div(self.V, COLUMN_TILE)

    @property
    def chunks(self) -> int:
        """CTAs that sort columns."""
        return ceil_div(self.column_tiles * COLUMN_TILE, CHUNK)

    @property
    def rounds_max(self) -> int:
        """Rounds, at most."""
        by_pairs = ceil_div(self.blocks * self.column_tiles * COLUMN_TILE, self.cap)
        return max(1, by_pairs, ceil_div(self.column_tiles, tiles_of_dense_round(self.cap, max(1, self.blocks))))

    @functools.cached_property
    def sizes(self) -> Any:
        """As kernels take them."""
        return Sizes(
            blocks=self.blocks,
            block_words=self.block_words,
            V=self.V,
            column_tiles=self.column_tiles,
            cap=self.cap,
            rounds_max=self.rounds_max,
            dense_cap=self.dense_cap,
            large_cap=self.large_cap,
            borrowed_cap=self.borrowed_cap,
            borrowed_tiles=self.borrowed_tiles,
        )

    @functools.cached_property
    def tables(self) -> dict[str, tuple[Any, tuple[int, ...]]]:
        """`(dtype, shape)` of each of `Tables`."""
        return {name: (table.dtype, table.shape(self)) for name, table in Tables.declared.items()}

    @functools.cached_property
    def offsets(self) -> Any:
        """`Tables` of where each table begins, in bytes, at multiples of 256."""
        return self._offsets_and_end[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all tables."""
        return self._offsets_and_end[1]

    @functools.cached_property
    def _offsets_and_end(self) -> tuple[Any, int]:
        offsets, end = {}, 0
        for name, (dtype, shape) in self.tables.items():
            offsets[name] = end
            end += ceil_div(math.prod(shape) * np.dtype(dtype).itemsize, _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        return Tables(**offsets), end

    def at(self, base: int) -> Any:
        """`Tables` of addresses, in an allocation of `nbytes` that begins at `base`, a multiple of 256."""
        return Tables(*(base + offset for offset in self.offsets))
