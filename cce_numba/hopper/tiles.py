"""Tile sizes of the tensor-core kernels, and what follows from them: bytes, threads, registers."""

from __future__ import annotations

from dataclasses import dataclass

from cce_numba.survivors import SURVIVOR_BLOCK

MAX_SMEM_BYTES = 227 * 1024  # of a CTA, ISA compute capability 9.0
_BARRIER_BYTES = 8
_ALIGNMENT_BYTES = 1024  # the 128-byte swizzle repeats after 8 rows of 128 bytes


@dataclass(frozen=True)
class HopperTiles:
    """One consumer warpgroup computes a `block_n` x `block_v` tile of logits, `block_d` terms at a time.

    Two consumers take turns: while one multiplies, the other folds its tile, so the tensor cores never wait for a fold.

    Attributes:
        block_n: tokens of a tile, and of a block of survivors.
        block_v: vocabulary entries of a tile.
        block_d: terms of the sum in one stage of the ring; 64 16-bit numbers are the 128 bytes of the swizzle.
        stages: stages of the ring in shared memory.
        cluster: CTAs that share each tile of `c`; each fetches a part and multicasts it to all.
    """

    block_n: int = 128
    block_v: int = 192
    block_d: int = 64
    stages: int = 5
    cluster: int = 2

    consumers = 2
    row_numbers = 8  # float32 that the consumers may tell each other of a row when they merge their states
    gatherers = 2  # warps that fetch rows of e one by one, where tokens are scattered
    producer_registers = 40
    consumer_registers = 232

    def __post_init__(self) -> None:
        reasons = [
            (
                self.block_n == SURVIVOR_BLOCK,
                "block_n must be 128: two 64-row products for each consumer, and the survivors' blocks",
            ),
            (
                self.block_v % 32 == 0 and 32 <= self.block_v <= min(192, self.consumer_registers - 32),
                f"block_v must be a multiple of 32, up to 192: words of survivor bits, and so many sums in registers out of "
                f"{self.consumer_registers}",
            ),
            (self.block_d == 64, "block_d must be 64: one row of a stage is the 128 bytes of the swizzle"),
            (1 <= self.cluster <= 4, "cluster must be 1 to 4: each warp of a consumer tells one CTA that a stage is free"),
            (
                self.cluster > 0 and self.block_v % (8 * self.cluster) == 0,
                "block_v must be a multiple of 8 * cluster: each CTA's part of a tile of c must start on the swizzle's pattern",
            ),
            (
                self.stages >= 4,
                "stages must be at least 4: one that is multiplied, and three that gathered rows take to arrive",
            ),
            (
                self.smem_bytes <= MAX_SMEM_BYTES,
                f"takes {self.smem_bytes} bytes of shared memory, but a CTA has at most {MAX_SMEM_BYTES}: fewer stages",
            ),
        ]
        for holds, reason in reasons:
            if not holds:
                raise ValueError(f"{self}: {reason}")

    @property
    def survivor_block(self) -> int:
        """Tokens that share survivor bits."""
        return self.block_n

    @property
    def fold_v(self) -> int:
        """Vocabulary entries of a row that a fold sees at a time."""
        return self.block_v

    @property
    def group_n(self) -> int:
        """Tokens of a cluster's CTAs together."""
        return self.block_n * self.cluster

    @property
    def e_bytes(self) -> int:
        """A stage's part for rows of e."""
        return self.block_n * self.block_d * 2

    @property
    def c_bytes(self) -> int:
        """A stage's part for rows of c."""
        return self.block_v * self.block_d * 2

    @property
    def stage_bytes(self) -> int:
        """One stage of the ring."""
        return self.e_bytes + self.c_bytes

    @property
    def scales_offset_bytes(self) -> int:
        """From the end of the ring to the tokens' logit scales: past what the consumers tell each other of each row."""
        return 4 * self.block_n * self.row_numbers

    @property
    def columns_offset_bytes(self) -> int:
        """From the end of the ring to the numbers that a consumer may keep of each column of its tile."""
        return self.scales_offset_bytes + 4 * self.block_n

    @property
    def rows_offset_bytes(self) -> int:
        """From the end of the ring to what a consumer may keep of each of its rows."""
        return self.columns_offset_bytes + 4 * self.consumers * self.block_v

    @property
    def smem_bytes(self) -> int:
        """All shared memory of a CTA: alignment, the ring, 32-bit numbers of rows and of columns."""
        return _ALIGNMENT_BYTES + self.ring_bytes + self.rows_offset_bytes + 4 * self.consumers * self.block_n

    @property
    def ring_bytes(self) -> int:
        """The stages, two barriers for each, and one for each consumer."""
        return self.stages * (self.stage_bytes + 2 * _BARRIER_BYTES) + self.consumers * _BARRIER_BYTES

    @property
    def full_arrivals(self) -> int:
        """Arrivals that complete a stage: the copying thread's, and one of each gathering warp."""
        return 1 + self.gatherers

    @property
    def threads(self) -> int:
        """Threads of a CTA: a producer warpgroup, and the consumers."""
        return 128 * (1 + self.consumers)
