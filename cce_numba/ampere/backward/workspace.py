"""The memory that a backward takes besides its inputs and the gradients, and how that cuts the backward into rounds."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from cce_numba.ampere.backward.records import Workspace
from cce_numba.arguments import Problem
from cce_numba.backend import Gradients
from cce_numba.integers import ceil_div
from cce_numba.survivors import SURVIVOR_BLOCK
from cce_numba.tensor_core import matrices
from cce_numba.tensor_core.backward.records import PARTS
from cce_numba.tensor_core.survey.tables import COLUMN_TILE, K_STEP, LIST_TILE, SurveyLayout

# Rounds whose G is there at a time: one is written, one is read, and a third gives both time to finish.
BUFFERS = 3
_SHARE = 0.115  # of the gradients' bytes: the workspace is to stay below it
_G_BYTES = 40 * 2**20, 96 * 2**20  # bytes of G, at least (rounds that are too small wait for each other) and at most
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
        itemsize: bytes of a number of e, c and G.
    """

    N: int
    V: int
    D: int
    with_e: bool
    with_sums: bool
    g_bytes: int
    itemsize: int = 2

    @classmethod
    def of(cls, N: int, V: int, D: int, *, with_e: bool, with_sums: bool, itemsize: int = 2) -> WorkspaceLayout:
        """The layout with as much room for G as keeps the whole within its share of the gradients' bytes, if that is enough."""
        allowed = int(_SHARE * itemsize * D * (N + V))
        without_g = _known(cls(N, V, D, with_e, with_sums, 0, itemsize))
        others = without_g.nbytes - BUFFERS * without_g.buffer_slots * without_g.slot_bytes
        g_bytes = min(max(allowed - others, _G_BYTES[0]), _G_BYTES[1]) >> 20 << 20
        return _known(cls(N, V, D, with_e, with_sums, g_bytes, itemsize))

    @property
    def blocks(self) -> int:
        """Blocks of tokens, at most."""
        return ceil_div(self.N, SURVIVOR_BLOCK)

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot: a column of G for a block, the column's vocabulary entry, and its sums."""
        return self.g_row_bytes + 4 + (4 * PARTS if self.with_sums else 0)

    @property
    def g_row_bytes(self) -> int:
        """Bytes of a column of G of a block."""
        return SURVIVOR_BLOCK * self.itemsize

    @functools.cached_property
    def buffer_slots(self) -> int:
        """Slots of a buffer."""
        least = 2 * COLUMN_TILE + self._overhead
        most = ceil_div(self.V, COLUMN_TILE) * COLUMN_TILE + self._overhead
        wanted = self.g_bytes // (BUFFERS * self.slot_bytes) // max(1, self.blocks)
        return self.blocks * (min(max(wanted, least), most) // K_STEP * K_STEP)

    @property
    def _overhead(self) -> int:
        """Slots of a block that a round may take beyond what the survey cuts at: part of a tile, and of a step of the sum."""
        return COLUMN_TILE + K_STEP

    @property
    def sums_e_bytes(self) -> int:
        """Bytes of dE's sums that are not complete, in float32, in whole tiles; none if there is only one round."""
        tiles = self.blocks * ceil_div(self.D, LIST_TILE)
        return 4 * SURVIVOR_BLOCK * LIST_TILE * tiles if self.with_e and self.survey.rounds_max > 1 else 0

    @functools.cached_property
    def survey(self) -> SurveyLayout:
        """The survey's tables, for rounds that fit the buffers."""
        cap = self.buffer_slots - self.blocks * self._overhead
        # Lists of dense rounds are whole tiles, as long in each round, and fill a buffer.
        return SurveyLayout(self.N, self.V, cap, dense_cap=self.buffer_slots, large_cap=self.buffer_slots)

    @functools.cached_property
    def offsets(self) -> dict[str, int]:
        """Where each part begins, in bytes, and the `end` of all."""
        slots = BUFFERS * self.buffer_slots
        sizes = {
            "counters": 4 * self.counters,
            "survey": self.survey.nbytes,
            "lists": 4 * slots,
            "g": self.g_row_bytes * slots,
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
        """The next job, and the jobs done in each phase; zeros at the beginning."""
        return 1 + 2 * self.survey.rounds_max

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return self.offsets["end"]

    def at(self, base: int) -> Any:
        """The kernel's record of a workspace that begins at address `base`."""
        offsets = self.offsets
        counters = base + offsets["counters"]
        return Workspace(
            next_job=counters,
            done=counters + 4,
            lists=base + offsets["lists"],
            g=base + offsets["g"],
            sums=base + offsets["sums"],
            sums_e=base + offsets["sums_e"],
            buffers=BUFFERS,
            buffer_slots=self.buffer_slots,
        )


@functools.lru_cache(maxsize=256)
def _known(layout: WorkspaceLayout) -> WorkspaceLayout:
    """Of equal layouts, the one that was made first: what follows from its sizes has been computed already."""
    return layout


def layout_of(p: Problem, into: Gradients) -> WorkspaceLayout:
    """The layout for these gradients of a problem, made in one pass."""
    return _layout(p, with_e=into.e is not None, with_sums=into.bias is not None)


def workspace_bytes(p: Problem) -> int:
    """The bytes that a backward takes for all gradients, if it makes the arrays for them.

    There are the workspace, copies of inputs whose rows cannot be copied 16 bytes at a time as they lie, and copies of
    gradients that cannot be stored so.
    """
    columns = matrices.padded_columns(p.D)
    copied = (x for x in (p.e, p.c) if matrices.why_not_by_rows(x) is not None)
    copies = sum(p.dtype.itemsize * x.shape[0] * columns for x in copied)
    if columns != p.D:
        itemsizes = p.grad_e_dtype.itemsize, p.grad_c_dtype.itemsize
        copies += sum(n * rows * columns for n, rows in zip(itemsizes, (p.N, p.V), strict=True))
    return copies + _layout(p, with_e=True, with_sums=p.bias is not None).nbytes if p.N else 0


def _layout(p: Problem, *, with_e: bool, with_sums: bool) -> WorkspaceLayout:
    columns, itemsize = matrices.padded_columns(p.D), p.dtype.itemsize
    return WorkspaceLayout.of(p.N, p.V, columns, with_e=with_e, with_sums=with_sums, itemsize=itemsize)
