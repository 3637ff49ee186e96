"""Forward on the CPU: each block of logits is made by the BLAS and folded into a running (max, sum) per token."""

from __future__ import annotations

from typing import Any

import numpy as np

from cce_numba import survivors as survivors_rule
from cce_numba.arguments import Problem
from cce_numba.backend import Statistics
from cce_numba.cpu.blocks import class_weights, finish_logits, ranges, rows, threads
from cce_numba.cpu.fold import fold_block
from cce_numba.cpu.tiles import CpuTiles
from cce_numba.progress import advance
from cce_numba.survivors import log_threshold


def counting_tokens(p: Problem) -> Any:
    """(n_valid,) the tokens that are not ignored, ascending."""
    return np.arange(p.N) if p.targets is None else np.flatnonzero(p.targets != p.options.ignore_index)


def target_logits(p: Problem, tokens: Any, block_n: int) -> Any:
    """(N,) the target's logit, 0 where ignored, NaN where the target is out of range."""
    out = np.zeros(p.N, p.compute_dtype)
    for start, stop in ranges(len(tokens), block_n):
        block = tokens[start:stop]
        targets = p.targets[block]
        in_range = (targets >= 0) & (targets < p.V)
        safe = np.where(in_range, targets, 0)
        z = np.vecdot(rows(p.e, block, p.compute_dtype), p.c[safe].astype(p.compute_dtype, copy=False))[:, None]
        if p.bias is not None:
            z += p.bias[safe].astype(z.dtype)[:, None]
        if p.logit_scale is not None:
            z *= p.logit_scale[block][:, None]
        if p.options.softcap is not None:
            z = z.dtype.type(p.options.softcap) * np.tanh(z / z.dtype.type(p.options.softcap))
        out[block] = np.where(in_range, z[:, 0], np.nan)
    return out


def forward(p: Problem, tiles: CpuTiles, record_survivors: bool) -> Statistics:
    """Log-sum-exp, target logit and survivors of each token, and its mean logit where it is asked for."""
    tokens = counting_tokens(p)
    target_logit = None if p.targets is None else target_logits(p, tokens, tiles.block_n)
    running_max, running_sum = np.full(len(tokens), -np.inf), np.zeros(len(tokens))
    total_logit = np.zeros(len(tokens)) if p.options.smooths_capped else None
    survivors = None
    if record_survivors:
        survivors = np.zeros((-(-len(tokens) // tiles.survivor_block), -(-p.V // 8)), np.uint8)
    block_n = tiles.block_n
    z_buffer = np.empty(min(block_n, len(tokens)) * tiles.block_v, p.compute_dtype)
    n_blocks, v_blocks = -(-len(tokens) // block_n), -(-p.V // tiles.block_v)
    for n_block, (n0, n1) in enumerate(ranges(len(tokens), block_n)):
        e = rows(p.e, tokens[n0:n1], p.compute_dtype)
        logit_seed = running_max[n0:n1] if target_logit is None else target_logit[tokens[n0:n1]]
        for v_block, (v0, v1) in enumerate(ranges(p.V, tiles.block_v)):
            z = z_buffer[: (n1 - n0) * (v1 - v0)].reshape(n1 - n0, v1 - v0)
            np.matmul(e, p.c[v0:v1].astype(p.compute_dtype, copy=False).T, out=z)
            finish_logits(z, p, tokens[n0:n1], slice(v0, v1))
            if total_logit is not None:
                total_logit[n0:n1] += z @ class_weights(p, slice(v0, v1))

            def fold(span: tuple[int, int], n0: int = n0, v0: int = v0, z: Any = z, seed: Any = logit_seed) -> None:
                a, b = span
                state = running_max[n0 + a : n0 + b], running_sum[n0 + a : n0 + b]
                flags = np.zeros(z.shape[1] if survivors is not None else 0, bool)
                fold_block(z[a:b], z[a:b].max(axis=1), *state, seed[a:b], log_threshold(p.options.filter_eps), flags)
                if survivors is not None:
                    packed = np.packbits(flags, bitorder="little")
                    survivors[(n0 + a) // tiles.survivor_block, v0 // 8 : v0 // 8 + len(packed)] = packed

            list(threads().map(fold, ranges(n1 - n0, tiles.survivor_block)))
            advance("forward", n_block * v_blocks + v_block + 1, n_blocks * v_blocks)
    lse = np.zeros(p.N, p.compute_dtype)
    lse[tokens] = np.log(running_sum) + np.where(running_max == -np.inf, 0, running_max)
    if survivors is not None:
        _keep_targets_and_nan(survivors, p, tokens, lse, target_logit, tiles.survivor_block)
        if np.bitwise_count(survivors).sum(dtype=np.int64) > survivors_rule.DENSE_SHARE * len(survivors) * p.V:
            survivors = None
    mean_logit = None
    if total_logit is not None:
        mean_logit = np.zeros(p.N, p.compute_dtype)
        mean_logit[tokens] = total_logit / p.V
    return Statistics(tokens, np.array(len(tokens)), lse, target_logit, survivors, tiles.survivor_block, mean_logit)


def _keep_targets_and_nan(survivors: Any, p: Problem, tokens: Any, lse: Any, target_logit: Any, block: int) -> None:
    """Targets survive whatever their probability, and a token whose loss is NaN keeps all of its block's columns."""
    lost = np.isnan(lse[tokens]) | np.isnan(target_logit[tokens])
    all_columns = np.packbits(np.ones(p.V, bool), bitorder="little")
    survivors[np.unique(np.flatnonzero(lost) // block)] = all_columns
    kept = np.flatnonzero(~lost)
    targets = p.targets[tokens[kept]]
    np.bitwise_or.at(survivors, (kept // block, targets >> 3), (1 << (targets & 7)).astype(np.uint8))
