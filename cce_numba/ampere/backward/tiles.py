"""Sizes of the backward's tiles: its three kinds of products all run through the same ring of stages."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from cce_numba.ampere.tiles import ALIGNMENT_BYTES, ROW_BYTES, THREADS, WARP_COLUMNS, smem_bytes_of
from cce_numba.survivors import SURVIVOR_BLOCK
from cce_numba.tensor_core.survey.tables import LIST_TILE

HEADER_WORDS = 16  # 32-bit words of a job's header
_MOST_STAGES = 5


@dataclass(frozen=True)
class BackwardTiles:
    """A job computes a tile of 128 x 192 numbers. A stage holds 64 terms of its sums.

    Attributes:
        stages: stages of the ring in shared memory.
        smem_limit_bytes: shared memory that a CTA may take.
    """

    stages: int = 5
    smem_limit_bytes: int = 227 * 1024

    block_n = SURVIVOR_BLOCK
    block_v = LIST_TILE
    warp_v = LIST_TILE // WARP_COLUMNS
    threads = THREADS

    def __post_init__(self) -> None:
        if self.stages < 2:
            raise ValueError(f"{self}: stages must be at least 2: one that is multiplied while another arrives")
        if self.smem_bytes > self.smem_limit_bytes:
            raise ValueError(
                f"{self}: takes {self.smem_bytes} bytes of shared memory, but a CTA has at most {self.smem_limit_bytes}: "
                "fewer stages"
            )

    @property
    def a_bytes(self) -> int:
        """A stage's part for A: 128 rows along K, or two panels across."""
        return self.block_n * ROW_BYTES

    @property
    def stage_bytes(self) -> int:
        """One stage: A, then B, which is 192 rows along K, or three panels across."""
        return (self.block_n + self.block_v) * ROW_BYTES

    @property
    def ring_bytes(self) -> int:
        """All stages. After a job's products, their memory is that through which its tile leaves."""
        return self.stages * self.stage_bytes

    @property
    def job_bytes(self) -> int:
        """A job's description: a header, the job's columns, their biases, and rows of e."""
        return 4 * (HEADER_WORDS + 2 * self.block_v + self.block_n)

    @property
    def smem_bytes(self) -> int:
        """All shared memory: alignment, the ring, and the job that is computed."""
        return ALIGNMENT_BYTES + self.ring_bytes + self.job_bytes


@functools.cache
def backward_tiles_for(cc: tuple[int, int]) -> BackwardTiles:
    """The tiles for a compute capability, with as many stages as fit, up to 5.

    >>> [backward_tiles_for(cc).stages for cc in ((9, 0), (8, 0), (8, 6))]
    [5, 4, 2]
    """
    limit = smem_bytes_of(cc)
    for stages in range(_MOST_STAGES, 2, -1):
        try:
            return BackwardTiles(stages, limit)
        except ValueError:
            continue
    return BackwardTiles(2, limit)
