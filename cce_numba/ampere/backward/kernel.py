"""The kernel of the backward. CTAs are persistent: they take jobs off one queue until none is left."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda

from cce_numba.ampere.backward.fill import make_fill
from cce_numba.ampere.backward.loop import make_loop, meet
from cce_numba.ampere.backward.records import WORD, Dimensions, Filling, Outputs, Shape, Thread, Workspace
from cce_numba.ampere.backward.scheduler import (
    D_E,
    END,
    LOGITS,
    begin,
    biases_smem,
    field,
    ids_smem,
    make_schedule,
    take,
)
from cce_numba.ampere.backward.store import (
    GPlace,
    make_finish_rows,
    make_partial_sums,
    make_store_g,
    make_write_g,
    partial_sums_offset,
)
from cce_numba.ampere.backward.tiles import BackwardTiles
from cce_numba.ampere.elements import elements_of
from cce_numba.ampere.tiles import ALIGNMENT_BYTES, THREADS
from cce_numba.launch.kernel import Kernel, kernel_factory, pointer_to
from cce_numba.ptx import arithmetic, control, memory
from cce_numba.ptx import fragment as fragments
from cce_numba.ptx.pointers import address_of
from cce_numba.survivors import SURVIVOR_BLOCK
from cce_numba.tensor_core.backward.chance import make_decide, make_find_maxima
from cce_numba.tensor_core.backward.column_sums import sum_of_column
from cce_numba.tensor_core.backward.form import GradientForm
from cce_numba.tensor_core.backward.phases import has_jobs_for
from cce_numba.tensor_core.backward.records import PARTS, ListColumns
from cce_numba.tensor_core.backward.row_weights import ROW_BYTES, make_two_row_weights
from cce_numba.tensor_core.backward.several import JobColumns, first_ordinal, make_mark_targets, make_write_targets
from cce_numba.tensor_core.records import I32, Chance, LogitTerms, Matrix, NoTargets, PlacedTargets
from cce_numba.tensor_core.schedule import quotient
from cce_numba.tensor_core.survey.tables import COLUMN_TILE, Tables

_MAXIMA_BYTES = 8 * 1024  # of the ring, for what the unbiased filter finds of a job's columns: maxima, then scales


@kernel_factory
def make_backward_kernel(tiles: BackwardTiles, dtype: np.dtype, form: GradientForm, allow_tf32: bool = False) -> Kernel:
    """The kernel for `dtype`, which looks at no option that it was not made for.

    Args:
        tiles: the tile sizes.
        dtype: of e and c.
        form: of G's entries.
        allow_tf32: float32 numbers may be rounded to tf32.
    """
    capped, scaled, smoothed, entropic = form.capped, form.scaled, form.smoothed, form.entropic
    by_chance, several, with_sums = form.by_chance, form.several, form.with_sums
    n, block_v, elements = tiles.warp_v, tiles.block_v, elements_of(dtype, allow_tf32)
    wide, g_row_bytes = elements.wide, elements.g_row_bytes
    schedule, fill, opaque = make_schedule(dtype), make_fill(tiles, elements), arithmetic.opaque_u32
    multiply_logits = make_loop(tiles, elements, fill.logits, False, False)
    multiply_d_e = make_loop(tiles, elements, fill.d_e, True, True)
    multiply_d_c = make_loop(tiles, elements, fill.d_c, False, True)
    write_g, store_g = make_write_g(tiles, dtype, form), make_store_g(tiles)
    find_maxima, decide = make_find_maxima(n, capped, scaled), make_decide(block_v, THREADS)
    mark_targets, write_targets = make_mark_targets(block_v), make_write_targets(dtype, capped, smoothed, entropic)
    two_row_weights, finish_rows = make_two_row_weights(scaled, smoothed, entropic), make_finish_rows(tiles, dtype)
    load_sums, store_sums = make_partial_sums(tiles)
    sums_tile_bytes, sums_half_bytes = map(np.uint64, partial_sums_offset(tiles))
    zeros, alignment = fragments.zeros(n), np.uint32(ALIGNMENT_BYTES - 1)
    ring_bytes = np.uint32(tiles.ring_bytes)
    maxima_bytes, scales_offset = np.uint32(_MAXIMA_BYTES), np.uint32(4 * 8 * block_v)

    # Below, `job` is the shared address of the job's description, `me` a `Thread`, `sums` the warp's four fragments.

    @cuda.jit(device=True, forceinline=True)
    def maxima_of_slab(
        x: Any, slab: Any, columns: Any, position: Any, row: Any, ring: Any, me: Any, terms: Any, tables: Any
    ) -> Any:  # fmt: skip
        """A slab's logits, whose largest probabilities in each column go to the ring. position, row: of the first row."""
        row_0, row_1 = two_row_weights(position, row, terms, tables)
        log_sums = tables.log_sums[position], tables.log_sums[position + 8]
        first = np.uint32(4 * n * me.warp_column)
        own = ListColumns(
            ids=np.uint32(columns.ids + first), biases=np.uint32(columns.biases + first), scales=columns.scales,
            stored=columns.stored,
        )  # fmt: skip
        maxima = np.uint32(ring + np.uint32(4 * block_v) * np.uint32(4 * me.warp_row + slab) + first)
        return find_maxima(x, own, row_0, row_1, log_sums, terms.softcap, maxima)

    @cuda.jit(device=True, forceinline=True)
    def g_of_slab(
        x: Any, slab: Any, columns: Any, position: Any, row: Any, staging: Any, g: Any, sums_at: Any, me: Any, terms: Any,
        tables: Any,
    ) -> None:  # fmt: skip
        """A slab's products, or logits, become G. g, sums_at: as in `GPlace`, for the first of all slabs."""
        row_0, row_1 = two_row_weights(position, row, terms, tables)
        part = np.uint64(4 * (4 * me.warp_row + slab))
        place = GPlace(
            staging=staging, g=np.uint64(g + np.uint64(16) * part), sums=sums_at + part, slab=np.int32(slab),
            first=np.int32(n * me.warp_column),
        )  # fmt: skip
        write_g(x, columns, place, row_0, row_1, terms.softcap, terms.class_weights)

    @cuda.jit(device=True, forceinline=True)
    def job_columns(job: Any, tables: Any, workspace: Any, dims: Any) -> Any:
        """The columns of a job LOGITS, for its rows' targets."""
        r, block = field(job, WORD.round), field(job, WORD.block_or_tile)
        of_list = np.int64(r) * (dims.blocks + 1) + block
        first_slot = np.int32((r % workspace.buffers) * workspace.buffer_slots + tables.first_slot[of_list])
        ordinal = first_ordinal(block, r, np.int32(field(job, WORD.slot) - first_slot), tables, dims)
        return JobColumns(ids=opaque(ids_smem(job)), first_ordinal=ordinal, block=block)

    @cuda.jit(device=True, forceinline=True)
    def store_logits(
        sums: Any, job: Any, ring: Any, me: Any, terms: Any, chance: Any, tables: Any, workspace: Any, placed: Any, dims: Any
    ) -> None:  # fmt: skip
        """Turns the products of a job LOGITS into G, in the workspace. placed: a `PlacedTargets`, or `NoTargets`."""
        x_0, x_1, x_2, x_3 = sums[0], sums[1], sums[2], sums[3]
        stored, slot, block = field(job, WORD.stored), np.int64(field(job, WORD.slot)), field(job, WORD.block_or_tile)
        ids, biases, scales = opaque(ids_smem(job)), opaque(biases_smem(job)), opaque(np.uint32(ring + scales_offset))
        columns = ListColumns(ids=ids, biases=biases, scales=scales, stored=stored)
        position = np.int64(block) * COLUMN_TILE + 64 * me.warp_row + (me.lane >> 2)
        row, step = np.uint64(address_of(tables.rows) + np.uint64(ROW_BYTES * position)), np.uint64(16 * ROW_BYTES)
        row_1, row_2, row_3 = np.uint64(row + step), np.uint64(row + step + step), np.uint64(row + step + step + step)
        if by_chance:
            x_0 = maxima_of_slab(x_0, 0, columns, position, row, ring, me, terms, tables)
            x_1 = maxima_of_slab(x_1, 1, columns, position + 16, row_1, ring, me, terms, tables)
            x_2 = maxima_of_slab(x_2, 2, columns, position + 32, row_2, ring, me, terms, tables)
            x_3 = maxima_of_slab(x_3, 3, columns, position + 48, row_3, ring, me, terms, tables)
            if several:
                meet()  # all maxima are there
                if me.number < SURVIVOR_BLOCK:
                    mark_targets(job_columns(job, tables, workspace, dims), me.number, ring, placed)
            decide(columns, ring, chance, np.int64(block), np.int32(0), me.number)
            columns = ListColumns(ids=ids, biases=biases, scales=opaque(scales), stored=stored)
        staging = np.uint32(ring + maxima_bytes) if by_chance else np.uint32(ring)
        sums_at = np.uint64(workspace.sums + np.uint64(4 * (slot * PARTS)))
        g = np.uint64(workspace.g + np.uint64(slot * g_row_bytes))
        g_of_slab(x_0, 0, columns, position, row, staging, g, sums_at, me, terms, tables)
        g_of_slab(x_1, 1, columns, position + 16, row_1, staging, g, sums_at, me, terms, tables)
        g_of_slab(x_2, 2, columns, position + 32, row_2, staging, g, sums_at, me, terms, tables)
        g_of_slab(x_3, 3, columns, position + 48, row_3, staging, g, sums_at, me, terms, tables)
        if not wide:
            meet()
            store_g(staging, g, stored, me.number)
        if several:
            meet()  # all have stored G
            if me.number < SURVIVOR_BLOCK:
                write_targets(job_columns(job, tables, workspace, dims), me.number, g, terms, tables, placed)

    @cuda.jit(device=True, forceinline=True)
    def sums_address(job: Any, me: Any, workspace: Any, outputs: Any) -> Any:
        """Where the thread's sums of a job D_E are kept from round to round."""
        d0, block = field(job, WORD.d0), np.int64(field(job, WORD.block_or_tile))
        tile = np.uint64(block * outputs.e.tiles + quotient(d0, np.int32(block_v)))
        half = sums_half_bytes if me.number >= 128 else np.uint64(0)
        return np.uint64(workspace.sums_e + tile * sums_tile_bytes + half + np.uint64(16 * (me.number & 127)))

    @cuda.jit(device=True, forceinline=True)
    def store_d_e(
        sums: Any, job: Any, ring: Any, me: Any, unscale: Any, tables: Any, workspace: Any, outputs: Any, dims: Any
    ) -> None:  # fmt: skip
        """Stores the sums of a job D_E; after the last round, as dE. unscale: takes the scale of the weights out of them."""
        if field(job, WORD.is_last) == 0:
            store_sums(sums, sums_address(job, me, workspace, outputs))
        else:
            first = np.int64(field(job, WORD.block_or_tile)) * COLUMN_TILE
            d0, adds = field(job, WORD.d0), outputs.adds
            finish_rows(sums, ring, me, outputs.e, tables.row_of, first, d0, dims.D, unscale, adds)

    @cuda.jit(device=True, forceinline=True)
    def store_d_c(
        sums: Any, job: Any, ring: Any, me: Any, unscale: Any, tables: Any, workspace: Any, outputs: Any, dims: Any
    ) -> None:  # fmt: skip
        """Stores the products of a job D_C, which are a tile of dC; the first of a tile's also the gradient of its biases."""
        d0, tile = field(job, WORD.d0), np.int64(field(job, WORD.block_or_tile))
        if outputs.c.address != 0:  # else the gradient of the bias alone is wanted
            finish_rows(sums, ring, me, outputs.c, tables.order, tile * COLUMN_TILE, d0, dims.D, unscale, outputs.adds)
        if with_sums and d0 == 0 and me.number < COLUMN_TILE:
            v = tables.order[tile * COLUMN_TILE + me.number]
            if v >= 0:
                r = field(job, WORD.round)
                slot, first_tile = field(job, WORD.slot), tables.first_tile[r]
                total = sum_of_column(me.number, tile, slot, r, first_tile, workspace.sums, tables, dims)
                outputs.bias[v] = unscale * total

    def backward_kernel(
        e: Any,  # Matrix (N, D)
        c: Any,  # Matrix (V, D)
        terms: Any,  # LogitTerms
        chance: Any,  # Chance
        n_valid: Any,  # pointer to (1,): how many tokens are listed
        tables: Any,  # the survey's Tables
        runs: Any,  # for which surveys it does anything, see `phases.has_jobs_for`
        workspace: Any,  # Workspace, whose counters are zeros
        outputs: Any,  # Outputs
        shape: Any,  # Shape
        placed: Any,  # PlacedTargets, or NoTargets
    ) -> None:
        """Any grid: writes or adds to the outputs; of dE, the rows of listed tokens with weight."""
        ring = np.uint32((memory.shared_address(cuda.shared.array(0, np.uint8)) + alignment) & ~alignment)
        job, thread = np.uint32(ring + ring_bytes), np.int32(cuda.threadIdx.x)
        warp, lane = np.int32(thread >> 5), np.int32(thread & 31)
        me = Thread(thread, lane, np.int32(warp & 1), np.int32(warp >> 1))
        column_tiles = quotient(shape.V + COLUMN_TILE - 1, np.int32(COLUMN_TILE))
        block_words = quotient(shape.blocks + 31, np.int32(32))
        dims = Dimensions(blocks=shape.blocks, block_words=block_words, column_tiles=column_tiles, D=shape.D)
        number, has_jobs = np.int32(0), has_jobs_for(runs, tables.dense[0] != 0)
        if warp == 0 and has_jobs:  # a kernel without jobs leaves the queue to the one that has them
            begin(job, lane)
            number = take(workspace.next_job, lane)
        while has_jobs:
            if warp == 0:
                # The number of the job after this one is asked for now, since it takes long to come.
                own = control.shuffle_i32(number, np.uint32(0))
                number = take(workspace.next_job, lane)
                n_blocks = np.int32((n_valid[0] + COLUMN_TILE - 1) // COLUMN_TILE)
                schedule(job, own, lane, terms, n_blocks, tables, workspace, outputs, dims)
            meet()
            kind, units, unscale = field(job, WORD.kind), field(job, WORD.units), tables.weight_scale[1]
            if kind == END:
                break
            filling = Filling(
                job=job, slot=field(job, WORD.slot), d0=field(job, WORD.d0), tile=field(job, WORD.block_or_tile),
                round=field(job, WORD.round), e=e, c=c, D=dims.D,
            )  # fmt: skip
            sums = (zeros(), zeros(), zeros(), zeros())
            if kind == LOGITS:
                if units > 0:
                    sums = multiply_logits(sums, ring, units, filling, workspace, tables, dims, me)
                    store_logits(sums, job, ring, me, terms, chance, tables, workspace, placed, dims)
            elif kind == D_E:
                if field(job, WORD.is_first) == 0:
                    sums = load_sums(sums, sums_address(job, me, workspace, outputs))
                sums = multiply_d_e(sums, ring, units, filling, workspace, tables, dims, me)
                store_d_e(sums, job, ring, me, unscale, tables, workspace, outputs, dims)
            else:
                sums = multiply_d_c(sums, ring, units, filling, workspace, tables, dims, me)
                store_d_c(sums, job, ring, me, unscale, tables, workspace, outputs, dims)
            meet()  # all have stored what is theirs, and are done with the ring and the description
            if thread == 0:
                memory.add_release_u32(workspace.done + np.uint64(4 * field(job, WORD.phase)), np.uint32(1))
            cuda.syncwarp()

    targets = PlacedTargets if several else NoTargets
    return Kernel(
        backward_kernel,
        (Matrix, Matrix, LogitTerms, Chance, pointer_to(np.int64), Tables, I32, Workspace, Outputs, Shape, targets),
        threads=tiles.threads,
        smem_bytes=tiles.smem_bytes,
    )
