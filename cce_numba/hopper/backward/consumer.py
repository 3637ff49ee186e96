"""A consumer warpgroup: multiplies a job's tile while the other consumer stores its own; then they change places."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import cuda

from cce_numba.hopper.backward.finish_rows import make_finish_rows
from cce_numba.hopper.backward.jobs import D_E, END, LOGITS, make_job_ring
from cce_numba.hopper.backward.kept import make_logits_of
from cce_numba.hopper.backward.multiply import ONE_CONSUMER, make_multiply, make_turns
from cce_numba.hopper.backward.records import WORD, GTile, TilePlace
from cce_numba.hopper.backward.store_g import make_store_g
from cce_numba.hopper.backward.tiles import STAGING_BYTES, BackwardTiles
from cce_numba.ptx import arithmetic, control, mbarrier, memory
from cce_numba.ptx import fragment as fragments
from cce_numba.ptx.pointers import address_of
from cce_numba.tensor_core import parked
from cce_numba.tensor_core.backward.chance import make_decide, make_find_maxima
from cce_numba.tensor_core.backward.column_sums import sum_of_column
from cce_numba.tensor_core.backward.divergence import make_park_products, make_two_rows
from cce_numba.tensor_core.backward.form import GradientForm
from cce_numba.tensor_core.backward.partial_sums import SUMS_STEP, make_add_sums, make_add_to_sums, make_store_sums
from cce_numba.tensor_core.backward.records import G_ROW_BYTES, PARTS, ListColumns
from cce_numba.tensor_core.backward.row_weights import ROW_BYTES, make_two_row_weights
from cce_numba.tensor_core.backward.several import JobColumns, first_ordinal, make_mark_targets, make_write_targets
from cce_numba.tensor_core.kept import TILE_BYTES
from cce_numba.tensor_core.schedule import quotient
from cce_numba.tensor_core.survey.tables import COLUMN_TILE


@functools.cache
def make_consume(tiles: BackwardTiles, dtype: np.dtype, form: GradientForm, keeps: bool) -> Any:
    """The device function of a consumer warpgroup; see `kernel.make_backward_kernel`."""
    capped, scaled, smoothed, entropic = form.capped, form.scaled, form.smoothed, form.entropic
    by_chance, several, with_sums = form.by_chance, form.several, form.with_sums
    jobs_, turns_ = make_job_ring(tiles), make_turns(tiles)
    field, wait_job, job_empty = jobs_.field, jobs_.wait_full, jobs_.empty
    columns_smem, bias_smem = jobs_.columns_smem, jobs_.bias_smem
    await_turn, await_products, hand_over = turns_.await_turn, turns_.await_products, turns_.hand_over
    name, block_v = "f16" if dtype == np.float16 else "bf16", tiles.block_v
    multiply_logits = make_multiply(tiles, name, a_m_major=False, b_n_major=False)
    multiply_d_e = make_multiply(tiles, name, a_m_major=True, b_n_major=True)
    multiply_d_c = make_multiply(tiles, name, a_m_major=False, b_n_major=True)
    has_teacher = form.teacher is not None
    store_g = make_store_g(block_v, dtype, form, finished=by_chance or keeps)
    logits_of = make_logits_of(block_v, capped, scaled)
    find_maxima, decide = make_find_maxima(block_v, capped, scaled), make_decide(block_v)
    mark_targets, write_targets = make_mark_targets(block_v), make_write_targets(dtype, capped, smoothed, entropic)
    consumers = np.int32(tiles.consumers)
    scales_bytes, warp_bytes = np.uint32(tiles.scales_bytes), np.uint32(4 * block_v)
    two_row_weights = make_two_row_weights(scaled, smoothed, entropic)
    multiply_teacher: Any = None
    park: Any = None
    teacher_rows, divergence_rows = make_two_rows(scaled)
    if form.teacher is not None:
        name = "f16" if form.teacher.dtype == np.float16 else "bf16"
        multiply_teacher = make_multiply(tiles, name, a_m_major=False, b_n_major=False)
        park = make_park_products(block_v, form.teacher, scaled)
    store_sums, add_to_sums, add_sums = make_store_sums(block_v), make_add_to_sums(block_v), make_add_sums(block_v)
    half_bytes = np.uint64(SUMS_STEP * (block_v // 8))  # of 64 rows of a tile of dE that is not complete
    finish_rows, zeros, opaque = make_finish_rows(block_v, dtype), fragments.zeros(block_v), arithmetic.opaque_u32

    # Below, `upper` and `lower` are fragments of the first and last 64 rows of a job's tile; `jobs` is the address of the job
    # ring; `s` is the number of a job of this CTA; `consumer` is 0 or 1; `thread` is 0 to 127; `staging` is the address of this
    # consumer's shared memory for tiles that leave; `tables` is the survey's `Tables`; `dims`, `workspace` and `outputs` are
    # of `records`; `distillation` is what `consume` takes as `instead`.

    @cuda.jit(device=True, forceinline=True)
    def parking_place(half: Any, consumer: Any, thread: Any, distillation: Any) -> Any:
        """Address of what the thread parks of half a tile."""
        slot = np.int32(np.int32(cuda.blockIdx.x) * consumers + consumer)
        return parked.place_of(distillation.heads.parked, slot, np.int32(half), thread)

    @cuda.jit(device=True, forceinline=True)
    def list_columns(jobs: Any, s: Any, scales: Any) -> Any:
        """The `ListColumns` of a job LOGITS."""
        ids, biases, stored = opaque(columns_smem(jobs, s)), opaque(bias_smem(jobs, s)), field(jobs, s, WORD.stored)
        return ListColumns(ids=ids, biases=biases, scales=scales, stored=stored)

    @cuda.jit(device=True, forceinline=True)
    def teach(
        ring: Any, first_use: Any, k_teacher: Any, jobs: Any, s: Any, consumer: Any, thread: Any, terms: Any, tables: Any,
        distillation: Any,
    ) -> None:  # fmt: skip
        """Multiplies the teacher's k_teacher stages of a job LOGITS, and parks what they come to."""
        upper, lower = multiply_teacher(zeros(), zeros(), ring, first_use, k_teacher, thread)
        await_products(ring, first_use, k_teacher, thread)
        teacher, columns = distillation.teacher, list_columns(jobs, s, np.uint32(0))
        position = np.int64(field(jobs, s, WORD.block_or_tile)) * COLUMN_TILE + (thread >> 5) * 16 + ((thread & 31) >> 2)
        row_0, row_1 = teacher_rows(position, terms, tables, distillation)
        place = parking_place(0, consumer, thread, distillation)
        park(upper, columns, row_0, row_1, teacher.softcap, teacher.bias, place)
        row_0, row_1 = teacher_rows(position + 64, terms, tables, distillation)
        place = parking_place(1, consumer, thread, distillation)
        park(lower, columns, row_0, row_1, teacher.softcap, teacher.bias, place)

    @cuda.jit(device=True, forceinline=True)
    def rows_at(position: Any, row_of_weights: Any, terms: Any, tables: Any, distillation: Any) -> Any:
        """What makes G of the logits of the listed tokens at `position` and 8 further on: `RowWeights`, or `DivergenceRow`."""
        if has_teacher:
            return divergence_rows(position, terms, tables, distillation)
        return two_row_weights(position, row_of_weights, terms, tables)

    @cuda.jit(device=True, forceinline=True)
    def beside(half: Any, consumer: Any, thread: Any, terms: Any, distillation: Any) -> Any:
        """What `store_g` takes beside: the address of class weights, or where the teacher's half is parked."""
        if has_teacher:
            return parking_place(half, consumer, thread, distillation)
        return terms.class_weights

    @cuda.jit(device=True, forceinline=True)
    def staging_of(smem: Any, consumer: Any) -> Any:
        """Address of this consumer's shared memory for tiles that leave. smem: a `SharedMemory`."""
        return np.uint32(smem.staging + np.uint32(consumer) * np.uint32(STAGING_BYTES))

    @cuda.jit(device=True, forceinline=True)
    def job_columns(jobs: Any, s: Any, block: Any, tables: Any, dims: Any) -> Any:
        """The columns of a job LOGITS, for its rows' targets."""
        r = field(jobs, s, WORD.round)
        skipped = np.int32(field(jobs, s, WORD.first_column) - COLUMN_TILE * tables.first_tile[r])
        ordinal = first_ordinal(block, r, skipped, tables, dims)
        return JobColumns(ids=opaque(columns_smem(jobs, s)), first_ordinal=ordinal, block=np.int32(block))

    @cuda.jit(device=True, forceinline=True)
    def store_logits(
        upper: Any, lower: Any, smem: Any, s: Any, consumer: Any, thread: Any, terms: Any, chance: Any,
        tables: Any, workspace: Any, instead: Any, dims: Any,
    ) -> None:  # fmt: skip
        """Turns the products of a job LOGITS into G, in the workspace.

        smem: a `SharedMemory`. terms: a `LogitTerms`. chance: a `Chance`. instead: see `consume`.
        """
        jobs, staging = smem.jobs, staging_of(smem, consumer)
        lane = np.int32(thread & 31)
        row = np.int32((thread >> 5) * 16 + (lane >> 2))  # the thread's rows are this one, and 8, 64, 72 further down
        ids, biases, stored = opaque(columns_smem(jobs, s)), opaque(bias_smem(jobs, s)), field(jobs, s, WORD.stored)
        scales = opaque(np.uint32(smem.scales + np.uint32(consumer) * scales_bytes))
        columns = ListColumns(ids=ids, biases=biases, scales=scales, stored=stored)
        slot = np.int64(field(jobs, s, WORD.slot))
        g = workspace.g_borrowed if field(jobs, s, WORD.round) < tables.n_borrowed[0] else workspace.g
        g = np.uint64(g + np.uint64(slot * G_ROW_BYTES))
        sums = np.uint64(workspace.sums + np.uint64(4 * (slot * PARTS + (thread >> 5))))
        block = np.int64(field(jobs, s, WORD.block_or_tile))
        position = block * COLUMN_TILE + row
        to = GTile(g=g, sums=sums, staging=staging, consumer=consumer)
        row_of_weights = np.uint64(address_of(tables.rows) + np.uint64(ROW_BYTES * position))
        next_half = np.uint64(row_of_weights + np.uint64(64 * ROW_BYTES))
        if by_chance:
            maxima = np.uint32(staging + np.uint32(thread >> 5) * warp_bytes)
            row_0, row_1 = two_row_weights(position, row_of_weights, terms, tables)
            log_sums = tables.log_sums[position], tables.log_sums[position + 8]
            upper = find_maxima(upper, columns, row_0, row_1, log_sums, terms.softcap, maxima)
            row_0, row_1 = two_row_weights(position + 64, next_half, terms, tables)
            log_sums = tables.log_sums[position + 64], tables.log_sums[position + 72]
            lower = find_maxima(
                lower, columns, row_0, row_1, log_sums, terms.softcap, np.uint32(maxima + np.uint32(4) * warp_bytes)
            )
            if several:
                cuda.syncwarp()  # the warp's maxima are there
                row = np.int32((thread >> 5) * 16 + (lane & 15) + 64 * (lane >> 4))
                mark_targets(job_columns(jobs, s, block, tables, dims), row, staging, instead)
            decide(columns, staging, chance, block, consumer, thread)
            columns = ListColumns(ids=ids, biases=biases, scales=opaque(scales), stored=stored)
        row_0, row_1 = rows_at(position, row_of_weights, terms, tables, instead)
        tile = field(jobs, s, WORD.kept) if keeps else np.int32(-1)
        kept = np.uint64(workspace.kept + np.uint64(TILE_BYTES) * np.uint64(block * workspace.kept_tiles))
        if keeps:
            upper = logits_of(upper, np.int32(0), tile, kept, thread, columns, row_0, row_1, terms.softcap)
        store_g(upper, columns, to, row_0, row_1, terms.softcap, beside(0, consumer, thread, terms, instead))
        to = GTile(g=np.uint64(g + np.uint64(128)), sums=np.uint64(sums + np.uint64(16)), staging=staging, consumer=consumer)
        row_0, row_1 = rows_at(position + 64, next_half, terms, tables, instead)
        if keeps:
            lower = logits_of(lower, np.int32(1), tile, kept, thread, columns, row_0, row_1, terms.softcap)
        store_g(lower, columns, to, row_0, row_1, terms.softcap, beside(1, consumer, thread, terms, instead))
        if several:
            control.barrier_sync(np.uint32(1 + consumer), ONE_CONSUMER)  # all have stored G
            write_targets(job_columns(jobs, s, block, tables, dims), thread, g, terms, tables, instead)
        memory.fence_proxy_async_all()  # the bulk copy engine will read G

    @cuda.jit(device=True, forceinline=True)
    def store_d_e(
        upper: Any, lower: Any, jobs: Any, s: Any, thread: Any, staging: Any, unscale: Any, tables: Any, workspace: Any,
        outputs: Any, dims: Any,
    ) -> None:  # fmt: skip
        """Adds the products of a job D_E to the sums of the rounds before, and stores the sums; after the last round, as dE.

        unscale: the inverse of the scale of the weights, by which dE is multiplied at the end.
        """
        d0, block = field(jobs, s, WORD.d0), np.int64(field(jobs, s, WORD.block_or_tile))
        is_first, is_last = field(jobs, s, WORD.is_first) != 0, field(jobs, s, WORD.is_last) != 0
        tile = np.uint64(block * outputs.e.tiles + quotient(d0, np.int32(block_v)))
        address = np.uint64(workspace.sums_e + tile * np.uint64(2 * half_bytes) + np.uint64(16 * thread))
        if not is_last:
            if is_first:
                store_sums(upper, address)
                store_sums(lower, address + half_bytes)
            else:
                add_to_sums(upper, address)
                add_to_sums(lower, address + half_bytes)
        else:
            if not is_first:
                upper, lower = add_sums(upper, address), add_sums(lower, address + half_bytes)
            place = TilePlace(rows=tables.row_of, first=block * COLUMN_TILE, d0=d0, D=dims.D)
            finish_rows(upper, lower, staging, thread, outputs.e, place, unscale, outputs.adds)

    @cuda.jit(device=True, forceinline=True)
    def store_d_c(
        upper: Any, lower: Any, jobs: Any, s: Any, thread: Any, staging: Any, unscale: Any, tables: Any, workspace: Any,
        outputs: Any, dims: Any,
    ) -> None:  # fmt: skip
        """Stores the products of a job D_C, which are a tile of dC.

        The first job of a tile of columns also computes the gradient of their biases. unscale: as in `store_d_e`.
        """
        d0, first = field(jobs, s, WORD.d0), np.int64(field(jobs, s, WORD.block_or_tile)) * COLUMN_TILE
        if outputs.c.address != 0:  # else the gradient of the bias alone is wanted
            place = TilePlace(rows=tables.order, first=first, d0=d0, D=dims.D)
            finish_rows(upper, lower, staging, thread, outputs.c, place, unscale, outputs.adds)
        if with_sums and field(jobs, s, WORD.d0) == 0:
            tile = np.int64(field(jobs, s, WORD.block_or_tile))
            v = tables.order[tile * COLUMN_TILE + thread]
            if v >= 0:
                r = field(jobs, s, WORD.round)
                first_tile = tables.first_tile[r]
                slot = field(jobs, s, WORD.slot)
                total = sum_of_column(thread, tile, slot, r, first_tile, workspace.sums, tables, dims)
                outputs.bias[v] = unscale * total

    @cuda.jit(device=True, forceinline=True)
    def consume(
        smem: Any, consumer: Any, thread: Any, terms: Any, chance: Any, tables: Any, workspace: Any, outputs: Any, dims: Any,
        instead: Any, k_teacher: Any,
    ) -> None:  # fmt: skip
        """By a consumer: computes every other job of this CTA, the first consumer from job 0 on, the second from job 1 on.

        smem: a `SharedMemory`. terms: a `LogitTerms`. chance: a `Chance`. instead: what takes the place of one target for each
        token: a `PlacedTargets` or a `Distillation`; a `NoTargets` if nothing does. k_teacher: how many stages of a job LOGITS,
        its first ones, are the teacher's.
        """
        jobs, ring, unscale = smem.jobs, smem.ring, tables.weight_scale[1]
        staging = staging_of(smem, consumer)
        s, turns = np.uint32(consumer), np.uint32(0)
        while True:
            wait_job(jobs, s)
            kind = field(jobs, s, WORD.kind)
            if kind == END:
                break
            first_use, k_steps = np.uint32(field(jobs, s, WORD.first_use)), field(jobs, s, WORD.k_steps)
            if kind == LOGITS:
                turns = await_turn(ring, consumer, s, turns)
                if has_teacher:
                    teach(ring, first_use, k_teacher, jobs, s, consumer, thread, terms, tables, instead)
                    first_use, k_steps = np.uint32(first_use + np.uint32(k_teacher)), np.int32(k_steps - k_teacher)
                upper, lower = multiply_logits(zeros(), zeros(), ring, first_use, k_steps, thread)
                hand_over(ring, consumer, first_use, k_steps, thread)
                store_logits(upper, lower, smem, s, consumer, thread, terms, chance, tables, workspace, instead, dims)
            elif kind == D_E:
                turns = await_turn(ring, consumer, s, turns)
                upper, lower = multiply_d_e(zeros(), zeros(), ring, first_use, k_steps, thread)
                hand_over(ring, consumer, first_use, k_steps, thread)
                store_d_e(upper, lower, jobs, s, thread, staging, unscale, tables, workspace, outputs, dims)
            else:
                turns = await_turn(ring, consumer, s, turns)
                upper, lower = multiply_d_c(zeros(), zeros(), ring, first_use, k_steps, thread)
                hand_over(ring, consumer, first_use, k_steps, thread)
                store_d_c(upper, lower, jobs, s, thread, staging, unscale, tables, workspace, outputs, dims)
            done = np.uint64(workspace.done + np.uint64(4 * field(jobs, s, WORD.phase)))
            if kind == D_E:
                done = np.uint64(workspace.done_e + np.uint64(4 * field(jobs, s, WORD.block_or_tile)))
            control.barrier_sync(np.uint32(1 + consumer), ONE_CONSUMER)
            if thread == 0:
                mbarrier.arrive(job_empty(jobs, s))
                memory.add_release_u32(done, np.uint32(1))
            s = np.uint32(s + np.uint32(2))

    return consume
