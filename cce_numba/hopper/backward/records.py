"""What the backward's kernel takes, and what its device functions hand each other, by name.

The words are those of the package's guide. Addresses in global memory are uint64, in shared memory uint32; both count bytes.
"""

from __future__ import annotations

import numpy as np
from numba.cuda import types

from cce_numba.launch.kernel import pointer_to
from cce_numba.launch.record import Record
from cce_numba.tensor_core.records import I32, I64, U32, U64, Output

# ---- what the kernel takes


class Workspace(Record):
    """Where the memory of a backward is; `workspace.WorkspaceLayout` says how much. Slots are numbered through all buffers."""

    next_job = U64  # address of a uint32: the number of the first job that nobody has taken
    done = U64  # address of (phases,) uint32: jobs of each phase that are done, those of dE apart
    done_e = U64  # address of (blocks,) uint32: jobs of dE that are done for each block, in all rounds
    lists = U64  # address of (slots,) int32: the vocabulary entry of each slot's column, at `lists.listed_place` of the slot
    g = U64  # address of (slots, 128) numbers of the inputs' dtype: a column of G of a block
    sums = U64  # address of (slots, PARTS) float32: the parts of the column's sum
    g_borrowed = U64  # the same in memory that is borrowed, for the first rounds of a dense problem
    sums_e = U64  # address of the tiles of dE that are not complete, float32, see `partial_sums`
    buffer_slots = I32  # slots of one of three buffers
    large_slots = I32  # slots of one of two buffers in the same memory, in a dense problem with dE
    borrowed_slots = I32  # the same of one of two buffers in borrowed memory
    kept = U64  # address of logits that the forward kept (`tensor_core.kept`)
    kept_tiles = I32  # tiles of each block that it kept, the first ones


class Outputs(Record):
    """Where the gradients go."""

    e = Output  # (N, D)
    c = Output  # (V, D)
    bias = pointer_to(np.float32)  # (V,), zeros; 0 if it is not wanted
    adds = I32  # whether dE and dC are added to what is there, not written over it


class Shape(Record):
    """How large the problem is."""

    blocks = I32  # blocks of 128 listed tokens, at most
    V = I32  # vocabulary entries
    D = I32  # hidden size


# ---- what device functions share


class Dimensions(Record):
    """How large the survey's tables are, and the hidden size.

    The kernel itself computes these numbers out of a `Shape`. So LLVM knows that they are not negative, and needs one register
    in place of two for each that takes part in 64-bit arithmetic.
    """

    blocks = I32  # blocks of 128 listed tokens, at most
    block_words = I32  # 32-bit words with a bit for each block
    column_tiles = I32  # tiles of 128 sorted columns
    D = I32


class SharedMemory(Record):
    """Where the parts of a CTA's shared memory begin."""

    staging = U32  # STAGING_BYTES of each consumer, through which tiles leave
    ring = U32  # the ring of stages, see `hopper.ring`
    jobs = U32  # the job ring, see `jobs`
    scales = U32  # 192 float32 of each consumer: what the unbiased filter multiplies columns of G by


class Header(Record):
    """A job, as the scheduling warp describes it to the CTA's other warps: 32-bit words in shared memory, in this order."""

    kind = I32  # LOGITS, D_E or D_C; or END, if there is no further job
    first_use = I32  # number of the use of the ring with which the job begins
    k_steps = I32  # stages
    block_or_tile = I32  # the block (LOGITS, D_E) or the tile (D_C) whose 128 rows the job computes
    d0 = I32  # first hidden entry that the job computes (D_E, D_C)
    stored = I32  # columns of G that the job stores (LOGITS): those of the list, and zeros up to a multiple of 64
    slot = I32  # first slot: of the job's columns (LOGITS), of the block's list (D_E), or of the buffer (D_C)
    first_column = I32  # number, as sorted, of the first column: of the round, and in a dense problem of the job (LOGITS)
    phase = I32
    round = I32
    is_first = I32  # whether the round is the first
    is_last = I32  # whether the round is the last
    shares_a = I32  # whether the cluster's other CTA multiplies the same A at the same time
    kept = I32  # LOGITS: the number of the tile among those of its block whose logits the forward kept, or -1


WORD = Header(*range(len(Header.declared)))  # the word of each field, by name


class Job(Record):
    """What the scheduling warp works out of a job's number. The fields are those of `Header`."""

    kind = I32
    k_steps = I32
    block_or_tile = I32
    d0 = I32
    stored = I32
    slot = I32
    first_column = I32
    shares_a = types.boolean
    kept = I32


class Extent(Record):
    """How much there is to do, as the survey found."""

    n_blocks = I32  # blocks of listed tokens
    rounds = I32
    empty_tiles = I32  # empty tiles, if their rows of dC are to become zeros, else 0
    is_dense = types.boolean


class Round(Record):
    """The round of the job that is being described."""

    number = I32
    phase = I32  # of the job: one of the round's two
    first_tile = I32  # the first of the round's tiles
    end_tile = I32  # the tile after its last
    first_slot = I32  # of the round's buffer
    first_column = I32  # number, as sorted, of the first column of the round's tiles
    first_empty = I64  # the first of the empty tiles whose rows of dC the round's products write, counted among empty tiles
    empty_tiles = I32  # how many these are


class Piece(Record):
    """What a gathering thread copies: 16 of each 128 bytes of a row, of the rows row, row + 8, ... row + 56 of a panel."""

    thread = I32  # number of the thread among those of the gathering warps
    lane = I32
    row = U32  # 0 to 7
    offset_bytes = U64  # of the 16 bytes in 128 bytes of a row, in global memory
    smem_bytes = U32  # of the 16 bytes of the first row in a panel, in shared memory, where rows are swizzled
    row_bytes = I32  # of a row of D numbers, from offset_bytes to its end


class TilePlace(Record):
    """Where a tile of 128 rows and 192 hidden entries belongs in dE or dC."""

    rows = pointer_to(np.int32)  # row of the gradient for each listed token (dE) or sorted column (dC), -1 for none
    first = I64  # the tile's first listed token or sorted column
    d0 = I32  # the tile's first hidden entry
    D = I32  # the hidden size


class GTile(Record):
    """Where 64 of the 128 tokens of a tile of G go."""

    g = U64  # address of the first column of G, from these tokens on
    sums = U64  # address of the part of the first column's sum that is of this warp's 16 tokens
    staging = U32  # address in shared memory of the consumer's STAGING_BYTES
    consumer = I32  # 0 or 1
