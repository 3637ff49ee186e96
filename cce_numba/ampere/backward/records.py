"""What the backward's kernel takes, and what its device functions hand each other, by name.

The words are those of the package's guide. Addresses in global memory are uint64, in shared memory uint32; both count bytes.
"""

from __future__ import annotations

import numpy as np

from cce_numba.launch.kernel import pointer_to
from cce_numba.launch.record import Record
from cce_numba.tensor_core.records import I32, U32, U64, Matrix, Output


class Workspace(Record):
    """Where the memory of a backward is; `workspace.WorkspaceLayout` says how much. Slots are numbered through all buffers."""

    next_job = U64  # address of a uint32: the number of the first job that nobody has taken
    done = U64  # address of (phases,) uint32: jobs of each phase that are done
    lists = U64  # address of (slots,) int32: the vocabulary entry of each slot's column
    g = U64  # address of (slots, 128) numbers of the inputs' dtype: a column of G of a block
    sums = U64  # address of (slots, PARTS) float32: the parts of the column's sum
    sums_e = U64  # address of the tiles of dE that are not complete, float32, see `partial_sums`
    buffers = I32
    buffer_slots = I32  # slots of a buffer


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


class Dimensions(Record):
    """How large the survey's tables are, and the hidden size, as the kernel computes them out of a `Shape`."""

    blocks = I32
    block_words = I32
    column_tiles = I32
    D = I32


class Header(Record):
    """A job, as the scheduling warp describes it to the others: 32-bit words in shared memory, in this order."""

    kind = I32  # LOGITS, D_E or D_C; or END, if there is no further job
    units = I32  # stages that it takes
    block_or_tile = I32  # the block (LOGITS, D_E) or the tile (D_C) whose 128 rows the job computes
    d0 = I32  # first hidden entry that the job computes (D_E, D_C)
    stored = I32  # columns of G that the job stores (LOGITS): those of the list, and zeros up to a multiple of 64
    slot = I32  # first slot: of the job's columns (LOGITS), of the block's list (D_E), or of the buffer (D_C)
    phase = I32  # also read by whoever describes the next job, as is the last word
    round = I32
    is_first = I32  # whether the round is the first
    is_last = I32  # whether the round is the last
    added = I32  # the last round for which the sums of dE of the round before have been waited for


WORD = Header(*range(len(Header.declared)))  # the word of each field, by name


class Round(Record):
    """The round of the job that is being described."""

    number = I32
    first_tile = I32  # the first of the round's tiles
    end_tile = I32  # the tile after its last
    first_slot = I32  # of the round's buffer


class Thread(Record):
    """Which part of a tile a thread multiplies."""

    number = I32  # 0 to 255
    lane = I32
    warp_row = I32  # 0: rows 0 to 63; 1: rows 64 to 127
    warp_column = I32  # which fourth of the columns


class Filling(Record):
    """What a job's stages are filled from."""

    job = U32  # shared address of the job's description
    slot = I32  # as in `Header`
    d0 = I32
    tile = I32  # of sorted columns (D_C)
    round = I32
    e = Matrix  # (N, D)
    c = Matrix  # (V, D)
    D = I32
