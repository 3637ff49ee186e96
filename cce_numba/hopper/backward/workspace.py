"""What a backward takes besides its inputs and the gradients, and how it is cut into rounds."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from cce_numba.hopper import tensor_map
from cce_numba.hopper.backward.epilogues import PARTS
from cce_numba.hopper.backward.tiles import G_ROW_BYTES, PANEL
from cce_numba.integers import ceil_div
from cce_numba.survivors import SURVIVOR_BLOCK
from cce_numba.tensor_core.survey.tables import COLUMN_TILE, K_STEP, LIST_TILE, SurveyLayout

BUFFERS = 3  # at least 2: rounds whose G is there at a time: one is written, one is read, one gives time to finish
BUFFERS_FOR_ALL = 2  # where all columns are kept for both gradients: jobs are many, so bigger rounds are worth more than time
_SHARE = 0.115  # of the gradients' bytes, that the workspace is to stay below
_G_BYTES = 40 * 2**20, 96 * 2**20  # at least (rounds that are too small wait for each other), and at most
_ALIGNMENT_BYTES = 256


@dataclass(frozen=True)
class Workspace:
    """One allocation.

    Attributes:
        N, V, D: of the problem.
        with_e: sums of dE are kept from round to round.
        with_sums: sums of G's columns are kept, for the gradient of the bias.
        keep_all: nothing is filtered.
        g_bytes: for G, about; it becomes less where there is little to do, and more where blocks are many.
    """

    N: int
    V: int
    D: int
    with_e: bool
    with_sums: bool
    keep_all: bool
    g_bytes: int

    @classmethod
    def of(cls, N: int, V: int, D: int, *, with_e: bool, with_sums: bool, keep_all: bool) -> Workspace:
        """With as much room for G as leaves all of it within the share of the gradients' bytes, if that is enough."""
        allowed = int(_SHARE * 2 * D * (N + V))
        without_g = _known(cls(N, V, D, with_e, with_sums, keep_all, 0))
        others = without_g.nbytes - without_g.buffers * without_g.buffer_slots * without_g.slot_bytes
        g_bytes = min(max(allowed - others, _G_BYTES[0]), _G_BYTES[1]) >> 20 << 20
        return _known(cls(N, V, D, with_e, with_sums, keep_all, g_bytes))

    @property
    def blocks(self) -> int:
        """Blocks of tokens, at most."""
        return ceil_div(self.N, SURVIVOR_BLOCK)

    @property
    def buffers(self) -> int:
        """Rounds whose G is there at a time."""
        return BUFFERS_FOR_ALL if self.keep_all and self.with_e else BUFFERS

    @property
    def slot_bytes(self) -> int:
        """A column of G for a block, its place in the list, and its sums."""
        return G_ROW_BYTES + 4 + (4 * PARTS if self.with_sums else 0)

    @functools.cached_property
    def buffer_slots(self) -> int:
        """Columns of G that a round has room for."""
        least = 2 * COLUMN_TILE + self._overhead
        most = ceil_div(self.V, COLUMN_TILE) * COLUMN_TILE + self._overhead
        wanted = self.g_bytes // (self.buffers * self.slot_bytes) // max(1, self.blocks)
        return self.blocks * (min(max(wanted, least), most) // K_STEP * K_STEP)

    @property
    def _overhead(self) -> int:
        """Columns of a block by which a round may exceed what the survey cuts at: part of a tile, and of a step of the sum."""
        return COLUMN_TILE + K_STEP

    @property
    def sums_e_bytes(self) -> int:
        """Tiles of dE, in float32, if there may be more than one round."""
        tiles = self.blocks * ceil_div(self.D, LIST_TILE)
        return 4 * SURVIVOR_BLOCK * LIST_TILE * tiles if self.with_e and self.survey.rounds_max > 1 else 0

    @functools.cached_property
    def survey(self) -> SurveyLayout:
        """Tables, for rounds that fit."""
        return SurveyLayout(self.N, self.V, self.buffer_slots - self.blocks * self._overhead)

    @functools.cached_property
    def offsets(self) -> dict[str, int]:
        """Where each part begins, in bytes, and the `end` of all."""
        slots = self.buffers * self.buffer_slots
        sizes = {
            "maps": 3 * 8 * tensor_map.WORDS,
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
        """The next job, and the jobs done in each phase."""
        return 1 + 2 * self.survey.rounds_max

    @property
    def nbytes(self) -> int:
        """Of all parts."""
        return self.offsets["end"]

    def g_map(self, g: int, dtype: np.dtype) -> tuple[int, ...]:
        """The tensor map of G at an address: a row of 128 tokens for each slot."""
        return tensor_map.encode_matrix(g, self.buffers * self.buffer_slots, SURVIVOR_BLOCK, G_ROW_BYTES, PANEL, dtype)


@functools.lru_cache(maxsize=256)
def _known(workspace: Workspace) -> Workspace:
    """The one of equal workspaces that came first, and so knows already what follows from it."""
    return workspace
