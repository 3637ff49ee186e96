"""Sizes of the backward's tiles: its three kinds of products all run through the same ring of stages."""

from __future__ import annotations

from dataclasses import dataclass

from cce_numba.hopper.tiles import HopperTiles
from cce_numba.tensor_core.survey.tables import LIST_TILE

PANEL = 64  # rows of a panel, and 16-bit numbers of a row: these are 128 bytes, the width of the swizzle's pattern
HEADER_WORDS = 16  # 32-bit words of a job's header
# Rounds whose G is in the workspace at a time: one is written, one is read, and a third gives both time to finish. In a dense
# problem with dE the jobs of dE give that time, so two larger buffers are better.
BUFFERS, LARGE_BUFFERS = 3, 2
# Tiles of 128 columns of a round where a token's row of dE must not depend on its batch (`Options.batch_invariant`). A round's
# products are summed up before they are added to those of other rounds, and in an exact problem rounds follow the vocabulary.
# With so many tiles G takes 9 KiB for each token, and sums of dE are read and written V / 1536 times.
FIXED_ROUND_TILES = 12
G_BOX = 32  # columns of G of 64 tokens that a consumer stores at a time
STAGING_BYTES = 2 * G_BOX * 2 * PANEL  # shared memory of a consumer through which tiles leave: two boxes
# The copying thread asks for the next job so many stages before the end of one. A job that was taken earlier would wait in a
# busy CTA while another CTA runs out of work.
LEAD = 16


@dataclass(frozen=True)
class BackwardTiles(HopperTiles):
    """A job computes a tile of 128 x 192 numbers. A stage holds 64 terms of its sums: two panels of A, three of B.

    Attributes:
        cluster: CTAs, one or two, that take neighbouring jobs. Where both multiply the same A, each fetches a panel for both.
        known_jobs: jobs that a CTA knows at a time, which are the entries of its job ring.
    """

    cluster: int = 1
    known_jobs: int = 4

    producer_registers = 56
    consumer_registers = 224

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_n != 2 * PANEL or self.block_v != LIST_TILE or self.cluster > 2:
            raise ValueError(f"{self}: the backward's stages are 2 and 3 panels, and its clusters have 1 or 2 CTAs")
        if self.known_jobs < 2 or self.known_jobs % 2:
            raise ValueError(f"{self}: known_jobs must be even, so that each belongs to one consumer")

    @property
    def full_arrivals(self) -> int:
        """Arrivals that complete a stage: one of the copying thread, and one of each gathering thread."""
        return 1 + 32 * self.gatherers

    @property
    def job_bytes(self) -> int:
        """Bytes of a job's entry: a header, the job's columns, and their biases."""
        return 4 * (HEADER_WORDS + 2 * LIST_TILE)

    @property
    def jobs_bytes(self) -> int:
        """Bytes of the job ring: entries, two barriers for each, one by which jobs are asked for, a cluster's mail.

        The mail is two words and two barriers.
        """
        return self.known_jobs * (self.job_bytes + 16) + 8 + 24

    @property
    def scales_bytes(self) -> int:
        """Bytes of what each consumer multiplies the columns of its job by."""
        return 4 * LIST_TILE

    @property
    def smem_bytes(self) -> int:
        """Bytes of a CTA's shared memory: alignment, what tiles leave through, the ring of stages, the job ring, scales."""
        return 1024 + self.consumers * (STAGING_BYTES + self.scales_bytes) + self.ring_bytes + self.jobs_bytes
