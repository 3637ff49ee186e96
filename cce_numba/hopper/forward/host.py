"""All launches of a forward: the list of tokens, target logits, then tiles of logits and their merge, part by part."""

from __future__ import annotations

from typing import Any

import numpy as np

from cce_numba.arguments import Problem
from cce_numba.backend import Statistics
from cce_numba.hopper import tensor_map
from cce_numba.hopper.forward.kernel import make_lse_kernel
from cce_numba.hopper.forward.layout import Layout, copy_rows
from cce_numba.survivors import coarse_eps_of, log_threshold
from cce_numba.tensor_core import matrices, merge
from cce_numba.tensor_core.indexed_dot import launch_indexed_dot
from cce_numba.tensor_core.merge import make_merge_kernel
from cce_numba.tensor_core.tokens import launch_prepare


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
                matrices.pitch_bytes(e),
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
