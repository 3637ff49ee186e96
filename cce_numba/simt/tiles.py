"""Tile sizes of the portable kernels: register-blocked on a GPU, tiny in the simulator, from the same source."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class SimtTiles:
    """One CTA computes a `block_n` x `block_v` tile of a product, `block_k` terms at a time; each thread a small part of it.

    Attributes:
        block_n: rows of a tile: tokens in the logits, and so the tokens that share survivor bits.
        block_v: columns of a tile: vocabulary entries in the logits; a multiple of 8, the bits of a byte of survivors.
        block_k: terms of the sum that are staged in shared memory at once.
        thread_n: rows that one thread computes.
        thread_v: columns that one thread computes, in groups of `vector`, so that shared-memory reads are wide.
        ctas: CTAs that run together on a multiprocessor, one loading while another computes; bounds a thread's registers.
    """

    block_n: int
    block_v: int
    block_k: int
    thread_n: int
    thread_v: int
    ctas: int = 2

    def __post_init__(self) -> None:
        reasons = [
            (self.block_n % self.thread_n == 0, "block_n must be a multiple of thread_n: threads tile the rows"),
            (self.block_v % self.thread_v == 0, "block_v must be a multiple of thread_v: threads tile the columns"),
            (self.block_v % 8 == 0, "block_v must be a multiple of 8: survivor bits fill whole bytes"),
            (self.thread_v % self.vector == 0, "thread_v must be a multiple of 4, or less than 4"),
            (
                self.block_n * self.block_k % self.threads == 0 and self.block_v * self.block_k % self.threads == 0,
                f"block_n * block_k and block_v * block_k must be multiples of the {self.threads} threads: each loads as many",
            ),
            (self.threads <= 1024, f"{self.threads} threads, but a CTA has at most 1024: enlarge thread_n or thread_v"),
        ]
        for holds, reason in reasons:
            if not holds:
                raise ValueError(f"{self}: {reason}")

    @property
    def survivor_block(self) -> int:
        """Tokens that share survivor bits."""
        return self.block_n

    @property
    def vector(self) -> int:
        """Neighbouring columns that a thread reads at once."""
        return min(4, self.thread_v)

    @property
    def threads_n(self) -> int:
        """Threads along the rows of a tile (`threadIdx.y`)."""
        return self.block_n // self.thread_n

    @property
    def threads_v(self) -> int:
        """Threads along the columns of a tile (`threadIdx.x`)."""
        return self.block_v // self.thread_v

    @property
    def threads(self) -> int:
        """Threads of a CTA."""
        return self.threads_n * self.threads_v


SIMULATOR_TILES = SimtTiles(block_n=4, block_v=8, block_k=4, thread_n=2, thread_v=4)
GPU_TILES = SimtTiles(block_n=128, block_v=128, block_k=8, thread_n=8, thread_v=8)
GPU_TILES_FLOAT64 = SimtTiles(block_n=64, block_v=64, block_k=16, thread_n=4, thread_v=4)


def choose_tiles(dtype: np.dtype, simulated: bool) -> SimtTiles:
    """The tiles for a compute dtype; a simulated thread costs as much as a thousand real ones, so there they are few."""
    if simulated:
        return SIMULATOR_TILES
    return GPU_TILES_FLOAT64 if dtype == np.float64 else GPU_TILES
