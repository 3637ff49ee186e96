"""Rows on their way to shared memory one by one: what one gathering thread copies to a panel at a time.

Eight threads share a row of a panel, 16 bytes each, and put them where the 128-byte swizzle wants them. A thread's rows are 8
apart, so that its 16 bytes have the same place in the swizzle's pattern in all of them. A panel has 64 rows, so a thread has
eight, and their numbers travel as a tuple, `ids`.

In this file `smem` is the address in shared memory of the thread's 16 bytes of its first row; `source` the address in global
memory of its 16 bytes of row 0; `pitch_bytes` the distance from one row to the next; `present` 1, or 0 if zeros are to be
written instead; `left_bytes` what is left of a row from the thread's 16 bytes on, of which the first 16 are copied if it is
above 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda

from cce_numba.hopper.backward.tiles import PANEL
from cce_numba.ptx import control, memory
from cce_numba.ptx.wgmma import PANEL_BYTES

PANEL_SMEM_BYTES, ROW_BYTES = np.uint32(PANEL_BYTES), 2 * PANEL
_STEP_BYTES = np.uint32(8 * ROW_BYTES)  # from one of a thread's rows to its next

load_id, load_if_4, shuffle = memory.load_shared_i32_freely, memory.load_if_4_u32, control.shuffle_i32
copy_16, copy_16_of_row = memory.copy_async_16_or_zeros, memory.copy_async_16_of_row


@cuda.jit(device=True, forceinline=True)
def is_some(left_bytes: Any) -> Any:
    """`present`, a uint32, if so many bytes of a row are left."""
    return np.uint32(1) if left_bytes > 0 else np.uint32(0)


# ---- copies


@cuda.jit(device=True, forceinline=True)
def copy_row(smem: Any, id: Any, source: Any, pitch_bytes: Any, present: Any) -> None:
    """Copies the thread's 16 bytes of row `id`."""
    # Two factors of 32 bits make the product one instruction.
    offset = np.uint64(np.uint32(id)) * np.uint64(np.uint32(pitch_bytes))
    copy_16(np.uint32(smem), np.uint64(source + offset), np.uint32(present))


@cuda.jit(device=True, forceinline=True)
def copy_row_or_zeros(smem: Any, id: Any, source: Any, pitch_bytes: Any, present: Any) -> None:
    """As `copy_row`, but zeros for row -1, which is nobody's."""
    copy_16_of_row(np.uint32(smem), source, np.int32(id) if present != 0 else np.int32(-1), np.uint32(pitch_bytes))


def _make_copy_rows(copy_one: Any) -> Any:
    """The device function that copies eight rows; copy_one: `copy_row` or `copy_row_or_zeros`."""

    @cuda.jit(device=True, forceinline=True)
    def copy_eight(smem: Any, ids: Any, source: Any, pitch_bytes: Any, present: Any) -> None:
        """Copies the thread's 16 bytes of eight rows to a panel."""
        step = _STEP_BYTES
        copy_one(smem, ids[0], source, pitch_bytes, present)
        copy_one(smem + step, ids[1], source, pitch_bytes, present)
        copy_one(smem + np.uint32(2) * step, ids[2], source, pitch_bytes, present)
        copy_one(smem + np.uint32(3) * step, ids[3], source, pitch_bytes, present)
        copy_one(smem + np.uint32(4) * step, ids[4], source, pitch_bytes, present)
        copy_one(smem + np.uint32(5) * step, ids[5], source, pitch_bytes, present)
        copy_one(smem + np.uint32(6) * step, ids[6], source, pitch_bytes, present)
        copy_one(smem + np.uint32(7) * step, ids[7], source, pitch_bytes, present)

    return copy_eight


copy_rows, copy_rows_or_zeros = _make_copy_rows(copy_row), _make_copy_rows(copy_row_or_zeros)


@cuda.jit(device=True, forceinline=True)
def copy_rows_across(smem: Any, ids: Any, source: Any, pitch_bytes: Any, left_bytes: Any) -> None:
    """Copies the thread's 16 bytes of eight rows to a panel, and what is 128 and 256 bytes further on to the next panels."""
    copy_rows(smem, ids, source, pitch_bytes, is_some(left_bytes))
    smem, source = np.uint32(smem + PANEL_SMEM_BYTES), np.uint64(source + np.uint64(ROW_BYTES))
    copy_rows(smem, ids, source, pitch_bytes, is_some(left_bytes - ROW_BYTES))
    smem, source = np.uint32(smem + PANEL_SMEM_BYTES), np.uint64(source + np.uint64(ROW_BYTES))
    copy_rows(smem, ids, source, pitch_bytes, is_some(left_bytes - 2 * ROW_BYTES))


@cuda.jit(device=True, forceinline=True)
def copy_rows_or_zeros_across(smem: Any, ids: Any, source: Any, pitch_bytes: Any, left_bytes: Any) -> None:
    """As `copy_rows_across`, but zeros for rows -1."""
    copy_rows_or_zeros(smem, ids, source, pitch_bytes, is_some(left_bytes))
    smem, source = np.uint32(smem + PANEL_SMEM_BYTES), np.uint64(source + np.uint64(ROW_BYTES))
    copy_rows_or_zeros(smem, ids, source, pitch_bytes, is_some(left_bytes - ROW_BYTES))
    smem, source = np.uint32(smem + PANEL_SMEM_BYTES), np.uint64(source + np.uint64(ROW_BYTES))
    copy_rows_or_zeros(smem, ids, source, pitch_bytes, is_some(left_bytes - 2 * ROW_BYTES))


@cuda.jit(device=True, forceinline=True)
def _copy_row_to_two(
    smem: Any, next_smem: Any, id: Any, source: Any, pitch_bytes: Any, present: Any, next_present: Any
) -> None:  # fmt: skip
    """Copies 16 bytes of row `id` to `smem`, and the 16 bytes 128 further on to `next_smem`; zeros where not present."""
    row = np.uint64(source + np.uint64(np.uint32(id)) * np.uint64(np.uint32(pitch_bytes)))
    copy_16(np.uint32(smem), row, present)
    copy_16(np.uint32(next_smem), np.uint64(row + np.uint64(ROW_BYTES)), next_present)


@cuda.jit(device=True, forceinline=True)
def copy_rows_to_two(smem: Any, next_smem: Any, ids: Any, source: Any, pitch_bytes: Any, left_bytes: Any) -> None:
    """Copies the thread's 16 bytes of eight rows to a panel, and what is 128 bytes further on to the panel at next_smem."""
    step, here, there = _STEP_BYTES, is_some(left_bytes), is_some(left_bytes - ROW_BYTES)
    _copy_row_to_two(smem, next_smem, ids[0], source, pitch_bytes, here, there)
    smem, next_smem = smem + step, next_smem + step
    _copy_row_to_two(smem, next_smem, ids[1], source, pitch_bytes, here, there)
    smem, next_smem = smem + step, next_smem + step
    _copy_row_to_two(smem, next_smem, ids[2], source, pitch_bytes, here, there)
    smem, next_smem = smem + step, next_smem + step
    _copy_row_to_two(smem, next_smem, ids[3], source, pitch_bytes, here, there)
    smem, next_smem = smem + step, next_smem + step
    _copy_row_to_two(smem, next_smem, ids[4], source, pitch_bytes, here, there)
    smem, next_smem = smem + step, next_smem + step
    _copy_row_to_two(smem, next_smem, ids[5], source, pitch_bytes, here, there)
    smem, next_smem = smem + step, next_smem + step
    _copy_row_to_two(smem, next_smem, ids[6], source, pitch_bytes, here, there)
    smem, next_smem = smem + step, next_smem + step
    _copy_row_to_two(smem, next_smem, ids[7], source, pitch_bytes, here, there)


# ---- numbers of rows


@cuda.jit(device=True, forceinline=True)
def ids_in_smem(address: Any) -> Any:
    """Eight int32 in shared memory, 8 apart. Past a list's end they are 0: what row 0 gives there is not looked at."""
    step = np.uint32(32)
    return (
        max(np.int32(load_id(address)), np.int32(0)),
        max(np.int32(load_id(address + step)), np.int32(0)),
        max(np.int32(load_id(address + np.uint32(2) * step)), np.int32(0)),
        max(np.int32(load_id(address + np.uint32(3) * step)), np.int32(0)),
        max(np.int32(load_id(address + np.uint32(4) * step)), np.int32(0)),
        max(np.int32(load_id(address + np.uint32(5) * step)), np.int32(0)),
        max(np.int32(load_id(address + np.uint32(6) * step)), np.int32(0)),
        max(np.int32(load_id(address + np.uint32(7) * step)), np.int32(0)),
    )


@cuda.jit(device=True, forceinline=True)
def ids_in_list(address: Any, wanted: Any) -> Any:
    """Eight int32 of a list that another CTA wrote, where they lie together (`lists.listed_place`); zeros if not wanted."""
    wanted = np.uint32(1) if wanted else np.uint32(0)
    return load_if_4(address, wanted) + load_if_4(address + np.uint64(16), wanted)


@cuda.jit(device=True, forceinline=True)
def ids_in_table(table: Any, first: Any) -> Any:
    """Eight int32 of a table of the survey, 8 apart; table: pointer to it."""
    return (
        table[first], table[first + 8], table[first + 16], table[first + 24],
        table[first + 32], table[first + 40], table[first + 48], table[first + 56],
    )  # fmt: skip


@cuda.jit(device=True, forceinline=True)
def ids_of_lanes(own: Any, lane: Any) -> Any:
    """By a warp: the int32 `own` of the lanes from `lane` to lane + 7."""
    one = np.uint32(1)
    return (
        shuffle(own, lane),
        shuffle(own, lane + one),
        shuffle(own, lane + np.uint32(2)),
        shuffle(own, lane + np.uint32(3)),
        shuffle(own, lane + np.uint32(4)),
        shuffle(own, lane + np.uint32(5)),
        shuffle(own, lane + np.uint32(6)),
        shuffle(own, lane + np.uint32(7)),
    )
