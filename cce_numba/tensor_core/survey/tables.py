"""What a survey leaves for the backward: its tables, and their places in one allocation."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from cce_numba.integers import ceil_div
from cce_numba.survivors import SURVIVOR_BLOCK

COLUMN_TILE = 128  # vocabulary entries whose gradient a job computes
LIST_TILE = 192  # columns of a list whose logits a job computes again
K_STEP = 64  # terms of the sum in a stage
GROUPS = 8  # of blocks: a column's key tells in which of them dC needs it (`columns.key_of`)
KEYS = 2**GROUPS
CHUNK = 4096  # columns that a CTA sorts
_ALIGNMENT_BYTES = 256


class Tables(NamedTuple):
    """Addresses of what `survey` makes, `blocks` for ceil(N / 128). Sorted columns are numbered j, tiles of 128 of them t."""

    rows: int  # (blocks * 128, 4) float32: softmax_weight * scale, target_weight * scale, lse * log2(e), bits of the target
    row_of: int  # (blocks * 128,) int32: row of e of each listed token, -1 if it has no weight
    whole: int  # (block_words,) uint32: bit b: block b is 128 consecutive rows of e
    alive: int  # (block_words,) uint32: bit b: some token of block b has weight
    scale: int  # (2,) float32: the power of two that weights are multiplied by, and its inverse
    order: int  # (n_ctiles * 128,) int32: the vocabulary's column, -1 past the last
    dense: int  # (1,) int32: 1 if all columns survive in all blocks, or are taken to
    bits: int  # (blocks, n_ctiles * 4) uint32: bit j & 31 of word j >> 5: sorted column j survives in the block
    live: int  # (n_ctiles, block_words) uint32: bit b: dC needs some column of the tile for block b
    before: int  # (blocks, n_ctiles + 1) int32: columns that survive in the block, in tiles before t
    n_live_tiles: int  # (1,) int32: tiles with a survivor; they are the first
    n_rounds: int  # (1,) int32
    first_tile: int  # (rounds_max + 1,) int32: of each round; n_live_tiles after the last round
    slot0: int  # (rounds_max, blocks + 1) int32: columns, padded to multiples of 64, of blocks before b
    first_g: int  # (rounds_max, blocks + 1) int32: jobs (192 columns) of blocks before b; at the end of all, made even
    phase_end: int  # (2 * rounds_max,) int32: jobs up to the end of each phase
    # What only the survey itself needs.
    n_alive: int  # (1,) int32: blocks with work
    keys: int  # (chunks * 4096,) uint8, of each column
    key_counts: int  # (chunks, 256) int32
    pairs: int  # (chunks,) int64: surviving (block, column) pairs
    tile_pairs: int  # (n_ctiles,) int32


@dataclass(frozen=True)
class SurveyLayout:
    """Sizes of the tables, and their places in one allocation.

    Attributes:
        N, V: of the problem.
        cap: surviving (block, column) pairs of a round, at least those of one tile.
    """

    N: int
    V: int
    cap: int

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
    def n_ctiles(self) -> int:
        """Tiles of sorted columns."""
        return ceil_div(self.V, COLUMN_TILE)

    @property
    def chunks(self) -> int:
        """CTAs that sort columns."""
        return ceil_div(self.n_ctiles * COLUMN_TILE, CHUNK)

    @property
    def rounds_max(self) -> int:
        """Rounds, at most."""
        return max(1, ceil_div(self.blocks * self.n_ctiles * COLUMN_TILE, self.cap))

    @functools.cached_property
    def tables(self) -> dict[str, tuple[Any, tuple[int, ...]]]:
        """`(dtype, shape)` of each of `Tables`."""
        blocks, block_words, n_ctiles, chunks, rounds = (
            self.blocks, self.block_words, self.n_ctiles, self.chunks, self.rounds_max,
        )  # fmt: skip
        i32, u32, f32 = np.int32, np.uint32, np.float32
        return {
            "rows": (f32, (blocks * SURVIVOR_BLOCK, 4)),
            "row_of": (i32, (blocks * SURVIVOR_BLOCK,)),
            "whole": (u32, (block_words,)),
            "alive": (u32, (block_words,)),
            "scale": (f32, (2,)),
            "order": (i32, (n_ctiles * COLUMN_TILE,)),
            "dense": (i32, (1,)),
            "bits": (u32, (blocks, n_ctiles * COLUMN_TILE // 32)),
            "live": (u32, (n_ctiles, block_words)),
            "before": (i32, (blocks, n_ctiles + 1)),
            "n_live_tiles": (i32, (1,)),
            "n_rounds": (i32, (1,)),
            "first_tile": (i32, (rounds + 1,)),
            "slot0": (i32, (rounds, blocks + 1)),
            "first_g": (i32, (rounds, blocks + 1)),
            "phase_end": (i32, (2 * rounds,)),
            "n_alive": (i32, (1,)),
            "keys": (np.uint8, (chunks * CHUNK,)),
            "key_counts": (i32, (chunks, KEYS)),
            "pairs": (np.int64, (chunks,)),
            "tile_pairs": (i32, (n_ctiles,)),
        }

    @functools.cached_property
    def offsets(self) -> Tables:
        """Where each table begins, in bytes, at multiples of 256."""
        return self._offsets_and_end[0]

    @property
    def nbytes(self) -> int:
        """Of all tables."""
        return self._offsets_and_end[1]

    @functools.cached_property
    def _offsets_and_end(self) -> tuple[Tables, int]:
        offsets, end = [], 0
        for name in Tables._fields:
            dtype, shape = self.tables[name]
            offsets.append(end)
            end += ceil_div(math.prod(shape) * np.dtype(dtype).itemsize, _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        return Tables(*offsets), end

    def at(self, base: int) -> Tables:
        """Addresses, in an allocation of `nbytes` that begins at base."""
        return Tables(*(base + offset for offset in self.offsets))
