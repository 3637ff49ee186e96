"""The memory that a backward takes besides its inputs and the gradients, and how that cuts the backward into rounds."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from cce_numba.arguments import Problem
from cce_numba.backend import Gradients
from cce_numba.hopper import tensor_map
from cce_numba.hopper.backward.records import Workspace
from cce_numba.hopper.backward.tiles import BUFFERS, FIXED_ROUND_TILES, LARGE_BUFFERS, PANEL
from cce_numba.integers import ceil_div
from cce_numba.survivors import SURVIVOR_BLOCK
from cce_numba.tensor_core import matrices
from cce_numba.tensor_core.backward.records import G_ROW_BYTES, PARTS
from cce_numba.tensor_core.survey.tables import COLUMN_TILE, K_STEP, LIST_TILE, SurveyLayout

_SHARE = 0.115  # of the gradients' bytes: the workspace is to stay below it
_G_BYTES = 40 * 2**20, 96 * 2**20  # bytes of G, at least (rounds that are too small wait for each other) and at most
_EVEN_COLUMNS = math.lcm(LIST_TILE, COLUMN_TILE)
_BORROWED_BYTES = 192 * 2**20  # of dC's memory that G takes at most: more does not pay
_ALIGNMENT_BYTES = 256


@dataclass(frozen=True)
class WorkspaceLayout:
    """The parts of the workspace, in one allocation.

    Attributes:
        N: tokens.
        V: vocabulary entries.
        D: hidden size.
        with_e: sums of dE are kept from round to round.
        with_sums: sums of G's columns are kept, for the gradient of the bias.
        g_bytes: for G, about; G takes less where there is little to do, and more where blocks are many.
        c_bytes: of dC's array, if G may borrow rows of it that are not written yet, else 0.
        fixed_tiles: tiles of a round of a dense problem, whatever N is; 0 if as many as fit.

    Larger rounds read and write the sums of dE less often. In a dense problem columns come in the order of the vocabulary, so
    the last rows of dC are written last. Until then their memory holds the G of the first rounds, which are larger.
    """

    N: int
    V: int
    D: int
    with_e: bool
    with_sums: bool
    g_bytes: int
    c_bytes: int = 0
    fixed_tiles: int = 0

    @classmethod
    def of(
        cls, N: int, V: int, D: int, *, with_e: bool, with_sums: bool, c_bytes: int = 0, fixed_tiles: int = 0
    ) -> WorkspaceLayout:  # fmt: skip
        """The layout with as much room for G as keeps the whole within its share of the gradients' bytes, if that is enough."""
        allowed = int(_SHARE * 2 * D * (N + V))
        without_g = _known(cls(N, V, D, with_e, with_sums, 0))
        others = without_g.nbytes - BUFFERS * without_g.buffer_slots * without_g.slot_bytes
        g_bytes = min(max(allowed - others, _G_BYTES[0]), _G_BYTES[1]) >> 20 << 20
        return _known(cls(N, V, D, with_e, with_sums, g_bytes, c_bytes if with_e and not with_sums else 0, fixed_tiles))

    @property
    def blocks(self) -> int:
        """Blocks of tokens, at most."""
        return ceil_div(self.N, SURVIVOR_BLOCK)

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot: a column of G for a block, the column's vocabulary entry, and its sums."""
        return G_ROW_BYTES + 4 + (4 * PARTS if self.with_sums else 0)

    @functools.cached_property
    def buffer_slots(self) -> int:
        """Slots of a buffer."""
        least = 2 * COLUMN_TILE + self._overhead
        most = ceil_div(self.V, COLUMN_TILE) * COLUMN_TILE + self._overhead
        wanted = self.g_bytes // (BUFFERS * self.slot_bytes) // max(1, self.blocks)
        if self.fixed_tiles:
            wanted = self.fixed_tiles * COLUMN_TILE
        return self.blocks * (min(max(wanted, least), most) // K_STEP * K_STEP)

    @property
    def slots(self) -> int:
        """Slots of all buffers."""
        return BUFFERS * self.buffer_slots

    @property
    def large_slots(self) -> int:
        """Slots of a buffer where these are two."""
        return self.slots // LARGE_BUFFERS // K_STEP * K_STEP

    @property
    def _overhead(self) -> int:
        """Slots of a block that a round may take beyond what the survey cuts at: part of a tile, and of a step of the sum."""
        return COLUMN_TILE + K_STEP

    @functools.cached_property
    def borrowed_slots(self) -> int:
        """Slots of a buffer in dC's memory, lists of equally many columns of all blocks; 0 if it is no larger than others."""
        if self.c_bytes == 0 or self.N == 0:
            return 0
        wanted = min(_BORROWED_BYTES, math.isqrt(self.c_bytes * self.slots * G_ROW_BYTES))
        columns = min(wanted // (LARGE_BUFFERS * G_ROW_BYTES * self.blocks), self.V) // _EVEN_COLUMNS * _EVEN_COLUMNS
        slots = self.blocks * columns
        return slots if slots > self.large_slots else 0

    @property
    def borrowed_bytes(self) -> int:
        """Bytes of dC's memory that buffers take, its last ones; the buffers begin at a multiple of 256."""
        return LARGE_BUFFERS * self.borrowed_slots * G_ROW_BYTES

    @property
    def borrowed_tiles(self) -> int:
        """Tiles of columns, the first ones, whose rows of dC lie before the memory that is borrowed."""
        row_bytes = self.c_bytes // self.V
        return max(0, self.c_bytes - self.borrowed_bytes - _ALIGNMENT_BYTES) // row_bytes // COLUMN_TILE if row_bytes else 0

    @property
    def sums_e_bytes(self) -> int:
        """Bytes of dE's sums that are not complete, in float32, in whole tiles; none if there is only one round."""
        tiles = self.blocks * ceil_div(self.D, LIST_TILE)
        return 4 * SURVIVOR_BLOCK * LIST_TILE * tiles if self.with_e and self.survey.rounds_max > 1 else 0

    @functools.cached_property
    def survey(self) -> SurveyLayout:
        """The survey's tables, for rounds that fit the buffers."""
        borrowed = (self.borrowed_slots, self.borrowed_tiles) if self.borrowed_slots else (0, 0)
        cap = self.buffer_slots - self.blocks * self._overhead
        return SurveyLayout(self.N, self.V, cap, self.buffer_slots, self.large_slots, *borrowed)

    @functools.cached_property
    def offsets(self) -> dict[str, int]:
        """Where each part begins, in bytes, and the `end` of all."""
        slots = self.slots
        sizes = {
            "maps": 4 * 8 * tensor_map.WORDS,
            "counters": 4 * self.counters,
            "survey": self.survey.nbytes,
            "lists": 4 * slots,
            "g": G_ROW_BYTES * slots,
            "sums": 4 * PARTS * slots if self.with_sums else 0,
            "sums_e": self.sums_e_bytes,
        }
        offsets, end = {}, 0
        for name, size in sizes.items():
            offsets[name] = end
            end += ceil_div(size, _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        return {**offsets, "end": end}

    @property
    def counters(self) -> int:
        """The next job, the jobs done in each phase, and the jobs of dE done for each block."""
        return 1 + 2 * self.survey.rounds_max + self.blocks

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return self.offsets["end"]

    def borrowed_at(self, c_address: int) -> int:
        """The address of the buffers in dC's memory, which begins at `c_address`."""
        latest = c_address + (self.c_bytes - self.borrowed_bytes)
        return latest - latest % _ALIGNMENT_BYTES

    def at(self, base: int, c_address: int, kept: int = 0, kept_tiles: int = 0) -> Any:
        """The kernel's record of a workspace that begins at address `base`.

        c_address: of dC's memory. kept, kept_tiles: the address of logits that the forward kept, and of how many tiles of a
        block.
        """
        counters, offsets = base + self.offsets["counters"], self.offsets
        return Workspace(
            next_job=counters,
            done=counters + 4,
            done_e=counters + 4 + 8 * self.survey.rounds_max,
            lists=base + offsets["lists"],
            g=base + offsets["g"],
            sums=base + offsets["sums"],
            g_borrowed=self.borrowed_at(c_address),
            sums_e=base + offsets["sums_e"],
            buffer_slots=self.buffer_slots,
            large_slots=self.large_slots,
            borrowed_slots=self.borrowed_slots,
            kept=kept,
            kept_tiles=kept_tiles,
        )

    def g_maps(self, base: int, c_address: int, dtype: np.dtype) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The tensor maps of G in a workspace that begins at address `base`, and in dC's memory.

        A row of 128 tokens for each slot. If nothing is borrowed, the second is the first again, and unused.
        """
        own = base + self.offsets["g"], self.slots
        borrowed = (self.borrowed_at(c_address), LARGE_BUFFERS * self.borrowed_slots) if self.borrowed_slots else own
        first, second = (
            tensor_map.encode_matrix(g, slots, SURVIVOR_BLOCK, G_ROW_BYTES, PANEL, dtype) for g, slots in (own, borrowed)
        )
        return first, second


@functools.lru_cache(maxsize=256)
def _known(layout: WorkspaceLayout) -> WorkspaceLayout:
    """Of equal layouts, the one that was made first: what follows from its sizes has been computed already."""
    return layout


def layout_of(p: Problem, into: Gradients, c_bytes: int) -> WorkspaceLayout:
    """The layout for these gradients of a problem, made in one pass. c_bytes: of dC's memory if G may borrow some, else 0."""
    return _layout(p, with_e=into.e is not None, with_sums=into.bias is not None, c_bytes=c_bytes)


def workspace_bytes(p: Problem) -> int:
    """The bytes that a backward takes for all gradients, if it makes the arrays for them.

    There are the workspace, copies of inputs whose rows cannot be copied 16 bytes at a time as they lie, and
    copies of gradients that cannot be stored so.
    """
    columns = matrices.padded_columns(p.D)
    copied = (x for x in (p.e, p.c) if matrices.why_not_by_rows(x) is not None)
    copies = sum(2 * x.shape[0] * columns for x in copied)
    if columns != p.D:
        itemsizes = 4 if p.options.accum_e_fp32 else 2, 4 if p.options.accum_c_fp32 else 2
        copies += sum(n * rows * columns for n, rows in zip(itemsizes, (p.N, p.V), strict=True))
    return copies + _layout(p, with_e=True, with_sums=p.bias is not None).nbytes if p.N else 0


def _layout(p: Problem, *, with_e: bool, with_sums: bool, c_bytes: int = 0) -> WorkspaceLayout:
    columns = matrices.padded_columns(p.D)
    fixed_tiles = FIXED_ROUND_TILES if with_e and p.options.batch_invariant else 0
    if fixed_tiles:
        c_bytes = 0
    return WorkspaceLayout.of(p.N, p.V, columns, with_e=with_e, with_sums=with_sums, c_bytes=c_bytes, fixed_tiles=fixed_tiles)
