"""Tile sizes of the backward's three products, which all run through the same ring of stages."""

from __future__ import annotations

from dataclasses import dataclass

from cce_numba.hopper.tiles import HopperTiles
from cce_numba.tensor_core.survey.tables import COLUMN_TILE, LIST_TILE

PANEL = 64  # rows of a panel, each of 64 16-bit numbers: 128 bytes, the swizzle's pattern
G_ROW_BYTES = 2 * COLUMN_TILE  # a column of G: 128 tokens
HEADER_WORDS = 16
G_BOX = 32  # columns of G that are stored at a time, for 64 tokens
STAGING_BYTES = 2 * G_BOX * 2 * PANEL  # of a consumer, through which tiles leave
LEAD = 16  # stages before the last of a job at which the next is asked for: just in time, so that none waits in a busy CTA


@dataclass(frozen=True)
class BackwardTiles(HopperTiles):
    """A job computes a 128 x 192 tile of G, dE or dC; each stage holds 64 terms of the sum: 2 panels of A, 3 panels of B.

    Attributes:
        cluster: CTAs that take neighbouring jobs, and share A where it is the same: each fetches a panel and multicasts it.
        job_slots: jobs that are known to a CTA at a time.
    """

    cluster: int = 1
    job_slots: int = 4

    producer_registers = 56
    consumer_registers = 224

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_n != 2 * PANEL or self.block_v != LIST_TILE or self.cluster > 2:
            raise ValueError(f"{self}: the backward's stages are 2 and 3 panels, and its CTAs work alone or in pairs")
        if self.job_slots < 2 or self.job_slots % 2:
            raise ValueError(f"{self}: job_slots must be even, so that each belongs to one consumer")

    @property
    def full_arrivals(self) -> int:
        """Arrivals that complete a stage: the copying thread's, and one of each gathering thread."""
        return 1 + 32 * self.gatherers

    @property
    def job_bytes(self) -> int:
        """A job's description: a header, the list's columns, and their biases."""
        return 4 * (HEADER_WORDS + 2 * LIST_TILE)

    @property
    def jobs_bytes(self) -> int:
        """The job slots, two barriers for each, and one by which jobs are asked for; a pair's mail, two words and barriers."""
        return self.job_slots * (self.job_bytes + 16) + 8 + 24

    @property
    def smem_bytes(self) -> int:
        """All shared memory of a CTA: alignment, what tiles leave through, the ring, the jobs."""
        return 1024 + self.consumers * STAGING_BYTES + self.ring_bytes + self.jobs_bytes
