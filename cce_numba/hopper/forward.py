"""The forward on tensor cores: log-sum-exp and survivor bits (paper section 4.2).

    producer warpgroup      one thread fetches tiles of e and c into a ring of stages (bulk copies by tensor maps); if the
                            tokens of a block are not neighbours, two more warps fetch their rows of e instead
    consumer warpgroups     two, each with a tile of 128 tokens x 192 vocabulary entries in registers. They take turns: one
                            multiplies while the other folds its tile into each row's (max, sum) and notes the survivors

CTAs of a cluster own neighbouring blocks of tokens and meet the same vocabulary at the same time, so each fetches a part of a
tile of c and multicasts it. Clusters are persistent workers; `schedule` says which tiles each takes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from cce_numba.arguments import Problem
from cce_numba.hopper import merge, tensor_map
from cce_numba.hopper.consumer import further_bytes, make_consume
from cce_numba.hopper.indexed_dot import launch_indexed_dot
from cce_numba.hopper.launch import Kernel, kernel_factory, pointer_to
from cce_numba.hopper.merge import make_merge_kernel
from cce_numba.hopper.prepare import launch_prepare
from cce_numba.hopper.producer import make_gather, make_produce
from cce_numba.hopper.ring import make_ring
from cce_numba.hopper.schedule import quotient
from cce_numba.hopper.tiles import HopperTiles
from cce_numba.hopper.workspace import Layout, copy_rows
from cce_numba.plan import Statistics
from cce_numba.ptx import cluster, control, memory
from cce_numba.survivors import coarse_eps_of, log_threshold


@kernel_factory
def make_lse_kernel(
    tiles: HopperTiles,
    dtype: np.dtype,
    bias_dtype: np.dtype | None,
    capped: bool,
    record: bool,
    scaled: bool = False,
    smoothed: bool = False,
) -> Kernel:
    """The kernel for 16-bit `dtype`; with or without bias, softcap and survivors, so that nobody pays for what others need.

    scaled: with a logit scale for each token. smoothed: logits are added up as well.
    """
    produce, gather = make_produce(tiles), make_gather(tiles)
    consume = make_consume(tiles, "f16" if dtype == np.float16 else "bf16", bias_dtype, capped, record, scaled, smoothed)
    init, ring_bytes = make_ring(tiles).init, np.uint32(tiles.ring_bytes)
    lower_registers = control.lower_registers(tiles.producer_registers)
    raise_registers = control.raise_registers(tiles.consumer_registers)
    block_v, block_d, first_gatherer = tiles.block_v, tiles.block_d, 128 - 32 * tiles.gatherers

    def lse_kernel(
        maps: Any,  # tensor maps of e and c, 128 bytes each
        e: Any,  # address of e, for rows that are fetched one by one
        e_pitch_bytes: Any,
        tokens: Any,  # address of (N,) rows of e, the first n_valid[0] count
        n_valid: Any,  # (1,)
        first_token: Any,  # of the list, at a multiple of group_n
        most_tokens: Any,
        per_round: Any,  # groups, see `schedule`
        bias: Any,  # address of (V,)
        softcap: Any,
        target_logit: Any,  # (N,) by row of e
        lse: Any,  # (N,) by row of e; what earlier launches have found, if has_lse
        has_lse: Any,
        part: Any,  # (slots, cluster, block_n) log-sum-exps
        survivors: Any,  # address of (blocks, pitch_words) words, zeroed
        pitch_words: Any,
        coarse_survivors: Any,  # address of as many, for a higher threshold, or 0
        log_eps: Any,
        log_coarser: Any,  # by how much their threshold is higher
        first_v_tile: Any,
        n_tiles: Any,
        first_row: Any,  # of c, that its tensor map begins with
        V: Any,
        D: Any,
        logit_scale: Any,  # (address of (N,) by row of e,), or () if not scaled
        smoothing: Any,  # (address of (V,) class weights or 0, address of totals in the order of part), or () if not smoothed
    ) -> None:
        """Grid of workers * cluster CTAs. Writes part (see `schedule`), and sets bits of survivors.

        tokens, survivors begin with those of first_token.
        """
        ring = (memory.shared_address(cuda.shared.array(0, np.uint8)) + np.uint32(1023)) & np.uint32(0xFFFFFC00)
        thread = np.int32(cuda.threadIdx.x)
        warpgroup = thread >> 7
        n_listed = np.int32(min(max(n_valid[0] - first_token, 0), most_tokens))
        k_steps = quotient(D + block_d - 1, block_d)
        if thread == 0:
            init(ring)
        cluster.sync()
        if warpgroup == 0:
            lower_registers()
            if thread == 0:
                first_v = np.int32(first_v_tile * block_v - first_row)
                produce(ring, maps, maps + np.uint64(128), tokens, n_listed, per_round, first_v, n_tiles, k_steps)
            elif thread >= first_gatherer:
                gather(ring, thread - first_gatherer, e, e_pitch_bytes, tokens, n_listed, per_round, n_tiles, k_steps, D)
        else:
            raise_registers()
            consume(
                ring, ring + ring_bytes, np.int32(warpgroup - 1), np.int32(thread & 127), tokens, n_listed, per_round,
                target_logit, bias, softcap, lse, has_lse, part, survivors, pitch_words, coarse_survivors,
                log_eps, log_coarser, first_v_tile, n_tiles, k_steps, V, logit_scale, smoothing,
            )  # fmt: skip
        cuda.syncwarp()
        cluster.sync()  # nobody leaves while others still write to its shared memory

    smem_bytes = tiles.smem_bytes + (further_bytes(tiles) if scaled or smoothed else 0)
    f32, i32, i64, u64 = types.float32, types.int32, types.int64, types.uint64
    p_f32 = pointer_to(np.float32)
    signature = types.void(
        *(u64, u64, i64, u64, pointer_to(np.int64), i64, i32, i32, u64, f32, p_f32, p_f32, i32, p_f32, u64, i64, u64, f32, f32),
        *(i32, i32, i32, i32, i32, types.UniTuple(u64, int(scaled)), types.UniTuple(u64, 2 * smoothed)),
    )
    return Kernel(lse_kernel, signature, threads=tiles.threads, cluster=tiles.cluster, smem_bytes=smem_bytes)


def forward(p: Problem, layout: Layout, record: bool) -> Statistics:
    """Log-sum-exp, target logit and survivors of each token, and its mean logit where it is asked for."""
    xp: Any = p.xp
    N, V, D, tiles = p.N, p.V, p.D, layout.tiles
    smoothed = p.options.smooths_capped
    record = record and not smoothed  # nothing is filtered
    lse, target_logit = xp.empty((2, N), np.float32)
    listing = (xp.empty if N else xp.zeros)(1 + (N + 1) // 2, np.int64)
    n_valid, tokens = listing[0], listing[1:].view(np.int32)[:N]
    pitch_words = layout.pitch_words if record else 0
    coarse_eps, coarse_words = coarse_eps_of(p.options) if record else None, 0
    if coarse_eps is not None:
        coarse_words = layout.blocks * pitch_words
    log_eps, log_coarse_eps = log_threshold(p.options.filter_eps), log_threshold(coarse_eps)
    rows = layout.blocks * (2 if coarse_words else 1)  # dC's bits follow the filter's
    survivors = xp.zeros((rows, pitch_words), np.uint32) if record else None
    survivors_pointer = survivors.data.ptr if survivors is not None and N else 0
    bits = None if survivors is None else survivors.view(np.uint8)[:, : -(-V // 8)]
    mean_logit = xp.zeros(N, np.float32) if smoothed else None
    of_targets = None if p.targets is None else target_logit
    statistics = Statistics(tokens, n_valid, lse, of_targets, bits, tiles.survivor_block, mean_logit)
    if N == 0:
        return statistics
    e, c = layout.e_in_reach(p), layout.c_in_reach(p)
    scratch = xp.empty(layout.scratch_bytes, np.uint8)  # tensor maps, then partial results
    maps, part = scratch.data.ptr, scratch.data.ptr + layout.map_bytes
    scale: tuple[int, ...] = () if p.logit_scale is None else (p.logit_scale.data.ptr,)
    smoothing: tuple[int, ...] = ()
    totals: tuple[int, ...] = ()
    if mean_logit is not None:
        part_total = xp.empty(layout.part_bytes, np.uint8)
        smoothing = 0 if p.class_weights is None else p.class_weights.data.ptr, part_total.data.ptr
        totals = part_total.data.ptr, mean_logit.data.ptr
    pointers = tokens.data.ptr, n_valid.data.ptr, target_logit.data.ptr, lse.data.ptr
    e_map = tensor_map.encode(e, tiles.block_n, tiles.block_d)
    launch_prepare(p, e_map, tensor_map.encode(c, tiles.block_v // tiles.cluster, tiles.block_d), maps, *pointers)
    if p.targets is not None:
        launch_indexed_dot(p, e, *pointers[:3], survivors_pointer, pitch_words, coarse_words)

    bias_dtype = None if p.bias is None else np.dtype(p.bias.dtype)
    capped = p.options.softcap is not None
    lse_kernel = make_lse_kernel(tiles, p.dtype, bias_dtype, capped, record, bool(scale), smoothed)
    merge_kernel = make_merge_kernel(tiles, smoothed)
    for first_row, first_tile, last_tile in layout.phases(record):
        if c is not p.c and first_tile * tiles.block_v == first_row:
            copy_rows(p.c[first_row : first_row + layout.c_rows], c)
        for first_token, n_tokens in layout.batches():
            listed = pointers[0] + 4 * first_token, pointers[1], first_token, n_tokens
            kept = survivors_pointer + 4 * pitch_words * (first_token // tiles.block_n)
            lse_kernel.launch(
                layout.workers * tiles.cluster,
                maps,
                e.data.ptr,
                tensor_map.pitch_bytes(e),
                *listed,
                layout.per_round,
                0 if p.bias is None else p.bias.data.ptr,
                p.options.softcap or 0.0,
                *pointers[2:],
                first_tile > 0,
                part,
                kept,
                pitch_words,
                kept + 4 * coarse_words if coarse_words else 0,
                log_eps,
                log_coarse_eps - log_eps if coarse_words else 0.0,
                first_tile,
                last_tile - first_tile,
                first_row,
                V,
                D,
                *scale,
                *smoothing,
            )
            merge_kernel.launch(
                merge.ctas_for(n_tokens),
                part,
                layout.workers,
                layout.per_round,
                last_tile - first_tile,
                *listed,
                *pointers[2:],
                kept,
                pitch_words if last_tile == layout.n_tiles else 0,
                coarse_words,
                V,
                *totals,
            )
    if mean_logit is not None:
        mean_logit /= V
    return statistics


def indexed_dot(p: Problem, layout: Layout) -> Any:
    """(N,) float32: the target's logit, 0 where ignored, NaN for a target out of range; the very bits of the forward's."""
    xp: Any = p.xp
    target_logit, unused = xp.empty(p.N, np.float32), xp.empty(p.N, np.float32)
    if p.N:
        tokens, n_valid, maps = xp.empty(p.N, np.int32), xp.empty((), np.int64), xp.empty(2 * tensor_map.WORDS, np.uint64)
        e, no_map = layout.e_in_reach(p), (0,) * tensor_map.WORDS
        pointers = tokens.data.ptr, n_valid.data.ptr, target_logit.data.ptr
        launch_prepare(p, no_map, no_map, maps.data.ptr, *pointers, unused.data.ptr)
        launch_indexed_dot(p, e, *pointers, 0, 0, 0)
    return target_logit
