"""How the CPU backend cuts a problem so that its workspace stays small at any vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

from cce_numba.arguments import Outline, Problem
from cce_numba.survivors import SURVIVOR_BLOCK

WORKSPACE_BYTES = 56 * 2**20  # all block buffers together; the promise is 64 MiB with what libraries take for themselves
_DE_ACCUMULATOR_BYTES = 16 * 2**20
_MAX_BLOCK_N, _MAX_BLOCK_V = 2048, 4096
_ANY_N = 2**40  # tokens, where it shall not matter how many there are


@dataclass(frozen=True)
class CpuTiles:
    """Block sizes in tokens and vocabulary entries.

    Attributes:
        survivor_block: tokens that share survivor bits; the backward compacts columns for each such block.
        block_n: tokens in a product where no column is skipped (forward, exact backward).
        block_v: vocabulary entries in a block; a multiple of 8, so that survivor bits fill whole bytes.
        dE_group: tokens whose fp32 `dE` is accumulated at once. Fewer than N only for 16-bit gradients of long inputs; then
            dE and dC are computed in separate passes, so that neither needs an accumulator of its full size.
    """

    survivor_block: int
    block_n: int
    block_v: int
    dE_group: int

    def block_bytes(self, D: int, itemsize: int) -> int:
        """Bytes of the block buffers: logits and their gradient's parts, gathered or widened rows of c and e, products."""
        return itemsize * (2 * self.block_n * self.block_v + 4 * self.block_v * D + 3 * self.block_n * D)


def choose_tiles(p: Outline | Problem) -> CpuTiles:
    """The largest blocks, up to where larger ones stop paying, that fit `WORKSPACE_BYTES`.

    For `Options.batch_invariant` they do not depend on N.
    """
    itemsize, N = p.compute_dtype.itemsize, _ANY_N if p.options.batch_invariant else p.N
    group, budget = max(1, N), WORKSPACE_BYTES
    if p.grad_e_dtype != p.compute_dtype:
        group = min(group, _survivor_multiple(max(1, _DE_ACCUMULATOR_BYTES // (itemsize * p.D))))
        budget -= group * p.D * itemsize
    whole = group >= N  # then a last block may be longer than what is left of the tokens
    block_n = _survivor_multiple(min(_MAX_BLOCK_N, -(-group // SURVIVOR_BLOCK) * SURVIVOR_BLOCK if whole else group))
    block_v = min(_MAX_BLOCK_V, -(-p.V // 8) * 8)
    while True:
        tiles = CpuTiles(min(SURVIVOR_BLOCK, block_n), block_n, block_v, group)
        if tiles.block_bytes(p.D, itemsize) <= budget or (block_n == 1 and block_v == 8):
            return tiles
        # Halve the one that makes the larger buffers, but keep products wide enough for the BLAS as long as possible.
        if block_v > 8 and (block_v >= block_n or block_n <= SURVIVOR_BLOCK):
            block_v = max(8, block_v // 2 // 8 * 8)
        else:
            block_n = _survivor_multiple(max(1, block_n // 2))


def _survivor_multiple(tokens: int) -> int:
    """Rounded down to a multiple of the survivor block, or to a power of two below it, so that blocks nest.

    >>> _survivor_multiple(300), _survivor_multiple(100)
    (256, 64)
    """
    return tokens // SURVIVOR_BLOCK * SURVIVOR_BLOCK if tokens >= SURVIVOR_BLOCK else 1 << (tokens.bit_length() - 1)
