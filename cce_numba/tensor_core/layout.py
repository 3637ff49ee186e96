"""What a forward takes besides its inputs, and how its work is cut: copies, batches of tokens, phases of the vocabulary."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from cce_numba import gpu
from cce_numba.arguments import Problem
from cce_numba.integers import ceil_div
from cce_numba.tensor_core import matrices
from cce_numba.tensor_core.folds.group_maxima import GROUP_BYTES, GROUPS
from cce_numba.tensor_core.schedule import count_slots, groups_per_round

# With survivors, the vocabulary goes in these parts, and each gives the next a bound of the log-sum-exp, where else each
# consumer of each worker would only know its own tiles. Tokenizers give the frequent entries the first numbers. The first part
# is small, since it knows least, but has tiles for all workers of a group. See benchmarks/NOTES.md.
FIRST_PHASE, LEAST_TILES, PHASE_GROWTH = 1 / 64, 16, 5
_COPY_BYTES = 64 * 2**20  # at most, for rows of c that the copy engine cannot read as they lie
# Of e, at a time: it stays in an L2 cache of 50 MB, of which each half keeps its own copy; or so much of a smaller cache.
_CACHED_BYTES, _CACHED_PERCENT = 14 * 2**20, 30
# Groups of tokens that go together by a fixed schedule: few, so that many workers share a group, however few groups there are;
# and enough to read c seldom.
_FIXED_GROUPS = 3
_MAXIMA_BYTES = 128 * 2**20  # of groups of entries, of the tokens of a launch, by which the best entries are found
_SCRATCH_BYTES = 960 * 2**10  # partial results of a launch: so many tokens go at a time


@dataclass(frozen=True)
class Layout:
    """How a problem is cut.

    Attributes:
        N, V, D, itemsize: of the problem.
        tiles: the tiles, with `block_n`, `block_v`, `group_n` and `cluster`, the CTAs that work together.
        workers: clusters that run at the same time.
        per_round: groups of tokens that they take at a time, see `schedule`.
        batch: tokens of a launch, at most.
        e_copied: why e must be copied for the copy engine to read it, or None.
        c_copied: why c must be copied, part by part, or None.
        c_rows: rows of c that are in reach of the copy engine at a time: V, or as many as a copy may hold.
        with_best: the best entries are wanted, so batches go one after the other, each through all of the vocabulary.
        fixed: the schedule is a fixed one, and phases are the same whether survivors are recorded or not: for
            `Options.batch_invariant`. Then what is found of a token depends on V, D, where c lies and the GPU, but not on N.
    """

    N: int
    V: int
    D: int
    tiles: Any
    workers: int
    per_round: int
    batch: int
    e_copied: str | None
    c_copied: str | None
    c_rows: int
    fixed: bool = False
    itemsize: int = 2
    with_best: bool = False

    @classmethod
    def of(cls, p: Problem, tiles: Any, D_beside: int = 0) -> Any:
        """The layout for a problem on CuPy's current device; D_beside: the hidden size of another head that is read beside."""
        device, itemsize, fixed = gpu.current(), p.dtype.itemsize, p.options.batch_invariant
        workers = device.multiprocessors // tiles.cluster
        cached_bytes = min(_CACHED_BYTES, device.l2_bytes * _CACHED_PERCENT // 100)
        per_round = groups_per_round(workers, cached_bytes // (itemsize * (p.D + D_beside) * tiles.group_n))
        if fixed:
            per_round = min(per_round, _FIXED_GROUPS)
        c_copied, c_rows = matrices.why_not(p.c), p.V
        if c_copied is not None:
            fitting = _COPY_BYTES // (itemsize * matrices.padded_columns(p.D)) // tiles.block_v * tiles.block_v
            c_rows = min(p.V, max(tiles.block_v, fitting))
        # Tokens of a launch: whole rounds, at least one.
        slots_of_round = workers // per_round * per_round
        rounds = max(1, (_SCRATCH_BYTES // (4 * tiles.group_n) - 2 * workers) // slots_of_round)
        batch = rounds * per_round * tiles.group_n
        with_best = p.options.top_k > 0
        if with_best:
            groups_bytes = GROUP_BYTES * tiles.group_n * groups_of_row(ceil_div(p.V, tiles.block_v), tiles)
            batch = min(batch, max(1, _MAXIMA_BYTES // groups_bytes) * tiles.group_n)
        sizes = p.N, p.V, p.D, tiles, workers, per_round, batch
        return _known(cls(*sizes, matrices.why_not(p.e), c_copied, c_rows, fixed, itemsize, with_best))

    @functools.cached_property
    def n_tiles(self) -> int:
        """Vocabulary tiles."""
        return ceil_div(self.V, self.tiles.block_v)

    @property
    def groups(self) -> int:
        """Groups of entries that have maxima (`folds.group_maxima`)."""
        return groups_of_row(self.n_tiles, self.tiles)

    @property
    def rows(self) -> int:
        """Tokens of a launch, in whole groups of tokens."""
        return ceil_div(min(self.N, self.batch), self.tiles.group_n) * self.tiles.group_n

    @property
    def best_bytes(self) -> int:
        """Maxima, where the best entries are wanted."""
        return GROUP_BYTES * self.rows * self.groups if self.with_best else 0

    @property
    def blocks(self) -> int:
        """Blocks of tokens, at most."""
        return ceil_div(self.N, self.tiles.block_n)

    @functools.cached_property
    def pitch_words(self) -> int:
        """32-bit words of a block's survivor bits: those of whole tiles."""
        return self.n_tiles * (self.tiles.block_v // 32)

    @property
    def survivor_bytes(self) -> int:
        """Survivor bits."""
        return 4 * self.blocks * self.pitch_words

    def scratch_bytes(self, numbers: int) -> int:
        """The partial results of a launch: `numbers` float32 for each token of each slot."""
        return 4 * numbers * self.part_numbers

    @functools.cached_property
    def part_numbers(self) -> int:
        """The tokens of all slots of a launch."""
        groups = ceil_div(min(self.N, self.batch), self.tiles.group_n)
        return self.tiles.group_n * count_slots(self.workers, groups, self.per_round)

    @property
    def copy_bytes(self) -> int:
        """Copies of e and of a part of c."""
        rows = (self.N if self.e_copied else 0) + (self.c_rows if self.c_copied else 0)
        return self.itemsize * rows * matrices.padded_columns(self.D)

    def e_in_reach(self, p: Problem) -> Any:
        """e, or a copy that the copy engine can read."""
        return p.e if self.e_copied is None else copy_rows(p.e, self._room(p, self.N))

    def c_in_reach(self, p: Problem) -> Any:
        """c, or room for the rows that are in reach at a time."""
        return p.c if self.c_copied is None else self._room(p, self.c_rows)

    def _room(self, p: Problem, rows: int) -> Any:
        return p.xp.empty((rows, matrices.padded_columns(self.D)), p.dtype)[:, : self.D]

    def phases(self, record: bool) -> list[tuple[int, int, int]]:
        """`(first row of c in reach, first tile, last tile)` of each launch."""
        return self._phases_with_survivors if record or self.fixed else self._cut({self.n_tiles})

    @functools.cached_property
    def _phases_with_survivors(self) -> list[tuple[int, int, int]]:
        ends, end = {self.n_tiles}, max(LEAST_TILES, round(self.n_tiles * FIRST_PHASE))
        while 2 * end < self.n_tiles:
            ends.add(end)
            end *= PHASE_GROWTH
        return self._cut(ends)

    def _cut(self, ends: set[int]) -> list[tuple[int, int, int]]:
        step = ceil_div(self.c_rows, self.tiles.block_v)
        cuts = sorted({*ends, *range(step, self.n_tiles, step)})
        return [(first // step * step * self.tiles.block_v, first, last) for first, last in zip([0, *cuts], cuts, strict=False)]

    def batches(self) -> list[tuple[int, int]]:
        """`(first token, tokens)` of each launch, of the list of tokens that count."""
        return [(first, min(self.batch, self.N - first)) for first in range(0, self.N, self.batch)]

    def launches(self, record: bool) -> list[tuple[tuple[int, int, int], tuple[int, int]]]:
        """`(phase, batch)` of each launch, in order: by phase, or by batch if the best entries of each are found at its end."""
        phases, batches = self.phases(record), self.batches()
        if self.with_best:
            return [(phase, batch) for batch in batches for phase in phases]
        return [(phase, batch) for phase in phases for batch in batches]


def groups_of_row(n_tiles: int, tiles: Any) -> int:
    """Groups of a row, in so many tiles of the vocabulary."""
    return n_tiles * (tiles.block_v // tiles.fold_v) * GROUPS


@functools.lru_cache(maxsize=256)
def _known(layout: Any) -> Any:
    """Of equal layouts, the one that was made first: what follows from its sizes has been computed already."""
    return layout


def copy_rows(matrix: Any, into: Any) -> Any:
    """Copies rows to the first rows of `into`, and returns those."""
    into[: matrix.shape[0]] = matrix
    return into[: matrix.shape[0]]
