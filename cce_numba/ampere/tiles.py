"""Tile sizes of the `mma.sync` kernels, chosen by the shared memory of a compute capability, and what follows from them."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from cce_numba.survivors import SURVIVOR_BLOCK

# Shared memory of a CTA, CUDA C++ Programming Guide, table "Technical specifications per compute capability".
_SMEM_BYTES = {(8, 0): 163 * 1024, (8, 7): 163 * 1024, (9, 0): 227 * 1024, (10, 0): 227 * 1024, (10, 3): 227 * 1024}
_LEAST_SMEM_BYTES = 99 * 1024  # of all others since 8.0: 8.6, 8.9, 12.0
ALIGNMENT_BYTES = 128  # of a row: the swizzle changes addresses within it
ROW_BYTES = 128  # of a stage's rows: 64 16-bit numbers
SLABS = 4  # of 16 rows, of a warp's part
WARP_COLUMNS = 4  # warps side by side; there are two rows of them
THREADS = 256  # that multiply


def smem_bytes_of(cc: tuple[int, int]) -> int:
    """Shared memory that a CTA may take on a device of a compute capability.

    >>> [smem_bytes_of(cc) // 1024 for cc in ((8, 0), (8, 9), (9, 0), (12, 0))]
    [163, 99, 227, 99]
    """
    return _SMEM_BYTES.get(cc, _LEAST_SMEM_BYTES)


@dataclass(frozen=True)
class AmpereTiles:
    """Eight warps compute a `block_n` x `block_v` tile of products, 128 bytes of each row of its operands at a time.

    Attributes:
        block_n: tokens of a tile, and of a block of survivors.
        block_v: vocabulary entries of a tile.
        stages: stages of the ring in shared memory.
        smem_limit_bytes: shared memory that a CTA may take.
        block_d: 16-bit terms of the sum in one stage, which are the 128 bytes of the swizzle; half as many have 32 bits.
    """

    block_n: int = 128
    block_v: int = 256
    stages: int = 4
    smem_limit_bytes: int = 227 * 1024
    block_d: int = 64

    cluster = 1  # CTAs that share tiles: none do
    row_numbers = 8  # float32 that warps may tell each other of a row when they merge their states

    def __post_init__(self) -> None:
        reasons = [
            (self.block_n == SURVIVOR_BLOCK, "block_n must be 128: two warps of 64 rows, and the survivors' blocks"),
            (
                self.block_v in (128, 256),
                "block_v must be 128 or 256: four warps side by side, each with one or two words of survivor bits",
            ),
            (self.block_d == 64, "block_d must be 64: one row of a stage is the 128 bytes of the swizzle"),
            (self.stages >= 2, "stages must be at least 2: one that is multiplied while another arrives"),
            (
                self.smem_bytes <= self.smem_limit_bytes,
                f"takes {self.smem_bytes} bytes of shared memory, but a CTA has at most {self.smem_limit_bytes}: fewer stages, "
                "or a smaller block_v",
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
        return self.warp_v

    @property
    def group_n(self) -> int:
        """Tokens that a CTA takes at a time."""
        return self.block_n

    @property
    def warp_v(self) -> int:
        """Columns of a warp's part."""
        return self.block_v // WARP_COLUMNS

    @property
    def a_bytes(self) -> int:
        """A stage's part for the 128 rows of the tile."""
        return self.block_n * ROW_BYTES

    @property
    def stage_bytes(self) -> int:
        """One stage: rows of A, then of B."""
        return (self.block_n + self.block_v) * ROW_BYTES

    @property
    def ring_bytes(self) -> int:
        """All stages. Between tiles of tokens, their memory is that through which warps merge their states."""
        return self.stages * self.stage_bytes

    @property
    def row_words_bytes(self) -> int:
        """Rows of e, targets and logit scales: 32 bits of each token."""
        return 3 * 4 * self.block_n

    @property
    def smem_bytes(self) -> int:
        """All shared memory: alignment, the ring, words of rows, and a number of each column for each of the eight warps."""
        return ALIGNMENT_BYTES + self.ring_bytes + self.row_words_bytes + 4 * 2 * self.block_v


@functools.cache
def tiles_for(cc: tuple[int, int], wide: bool = False) -> AmpereTiles:
    """The tiles for a compute capability: the widest, with as many stages as fit, up to 4.

    wide: for 32-bit numbers, whose parts and sums leave registers for 128 columns.

    >>> [(tiles_for(cc).block_v, tiles_for(cc).stages) for cc in ((9, 0), (8, 0), (8, 6))]
    [(256, 4), (256, 3), (128, 3)]
    """
    limit = smem_bytes_of(cc)
    for block_v, stages in ((128, 4), (128, 3)) if wide else ((256, 4), (256, 3), (128, 3)):
        try:
            return AmpereTiles(block_v=block_v, stages=stages, smem_limit_bytes=limit)
        except ValueError:
            continue
    raise ValueError(f"cc: no tile fits the {limit} bytes of shared memory of compute capability {cc}")
