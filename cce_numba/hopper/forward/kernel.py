"""The kernel of the forward: log-sum-exp, survivor bits and whatever else is folded from tiles of logits (paper section 4.2).

    producer warpgroup      one thread fetches tiles of e and c into a ring of stages, by bulk copies that tensor maps
                            describe. If the tokens of a block are not neighbours, two more warps fetch their rows of e
    consumer warpgroups     two, each with a tile of 128 tokens x 192 vocabulary entries in registers. They take turns: one
                            multiplies while the other folds its tile

The CTAs of a cluster own neighbouring blocks of tokens and meet the same vocabulary at the same time, so each fetches a part of
a tile of c and multicasts it to all. Clusters are persistent workers; `tensor_core.schedule` says which tiles each takes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda

from cce_numba.hopper.forward.batch import Batch
from cce_numba.hopper.forward.consumer import Consumer, make_consume
from cce_numba.hopper.forward.producer import make_gather, make_produce
from cce_numba.hopper.ring import make_ring
from cce_numba.hopper.tiles import HopperTiles
from cce_numba.launch.kernel import Kernel, kernel_factory
from cce_numba.ptx import cluster, control, memory
from cce_numba.tensor_core.divergence import TeacherForm
from cce_numba.tensor_core.folds import Fold, found_class, number_count
from cce_numba.tensor_core.records import (
    I32,
    U64,
    LogitTerms,
    Matrix,
    NoTeacher,
    Parts,
    Survivors,
    Teacher,
    Tokens,
    Vocabulary,
)
from cce_numba.tensor_core.schedule import quotient


@kernel_factory
def make_forward_kernel(
    tiles: HopperTiles,
    dtype: np.dtype,
    bias_dtype: np.dtype | None,
    capped: bool,
    scaled: bool,
    folds: tuple[Fold, ...],
    fixed: bool = False,
    teacher: TeacherForm | None = None,
) -> Kernel:
    """The kernel for 16-bit `dtype`, with what a problem asks for, so that nobody pays for what others need.

    bias_dtype: of the bias, or None without one. capped: with a softcap. scaled: with a logit scale for each token. folds: what
    is made of the tiles; the first is `max_sum`. fixed: by a fixed schedule (`schedule`). teacher: another head, whose products
    of each tile come first, for the fold `divergence`. Raises ValueError if a row's folds have more numbers than
    `tiles.row_numbers`.
    """
    if (numbers := number_count(folds)) > tiles.row_numbers:
        raise ValueError(
            f"folds: their workers tell each other {numbers} numbers of a row, and shared memory has room for "
            f"{tiles.row_numbers}: fewer folds, or a larger `HopperTiles.row_numbers`"
        )
    has_teacher = teacher is not None
    produce, gather = make_produce(tiles, fixed, has_teacher), make_gather(tiles, fixed, has_teacher)
    consume = make_consume(tiles, dtype, bias_dtype, capped, scaled, folds, fixed, teacher)
    init = make_ring(tiles).init
    lower_registers = control.lower_registers(tiles.producer_registers)
    raise_registers = control.raise_registers(tiles.consumer_registers)
    block_v, block_d, first_gatherer = tiles.block_v, tiles.block_d, 128 - 32 * tiles.gatherers

    def forward_kernel(
        maps: Any,  # address of the tensor maps of e and c, and of the teacher's, 128 bytes each
        e: Matrix,  # for rows that are fetched one by one
        tokens: Tokens,  # a batch, which begins at a multiple of group_n
        per_round: Any,  # groups of tokens, see `schedule`
        terms: LogitTerms,
        found: Any,  # Found, or FoundOfMore
        has_earlier: Any,  # whether results of earlier parts of the vocabulary are there, to go on from
        parts: Parts,
        survivors: Survivors,  # from the batch's first block on
        vocabulary: Vocabulary,
        D: Any,
        taught: Any,  # Teacher, or NoTeacher
    ) -> None:
        """Grid of workers * cluster CTAs. Writes parts, in the slots that `schedule` gives, and sets bits of survivors."""
        ring = (memory.shared_address(cuda.shared.array(0, np.uint8)) + np.uint32(1023)) & np.uint32(0xFFFFFC00)
        thread = np.int32(cuda.threadIdx.x)
        warpgroup = thread >> 7
        n_listed = np.int32(min(max(tokens.n_valid[0] - tokens.first, 0), tokens.most))
        batch = Batch(tokens.listed, n_listed, np.int32(per_round))
        k_steps, k_teacher = quotient(D + block_d - 1, block_d), np.int32(0)
        if has_teacher:
            k_teacher = quotient(taught.D + block_d - 1, block_d)
        if thread == 0:
            init(ring)
        cluster.sync()
        if warpgroup == 0:
            lower_registers()
            if thread == 0:
                first_v = np.int32(vocabulary.first_tile * block_v - vocabulary.first_row)
                produce(ring, maps, batch, first_v, vocabulary.n_tiles, k_teacher, k_steps)
            elif thread >= first_gatherer:
                gather(ring, thread - first_gatherer, e, taught, batch, vocabulary.n_tiles, k_teacher, k_steps, D)
        else:
            raise_registers()
            me = Consumer(np.int32(warpgroup - 1), np.int32(thread & 127))
            consume(
                ring, me, batch, terms, found, has_earlier, parts, survivors, vocabulary, taught, k_teacher, k_steps
            )  # fmt: skip
        cuda.syncwarp()
        cluster.sync()  # nobody leaves while others still write to its shared memory

    found, of_teacher = found_class(folds), Teacher if has_teacher else NoTeacher
    parameters = U64, Matrix, Tokens, I32, LogitTerms, found, I32, Parts, Survivors, Vocabulary, I32, of_teacher
    return Kernel(forward_kernel, parameters, threads=tiles.threads, cluster=tiles.cluster, smem_bytes=tiles.smem_bytes)
