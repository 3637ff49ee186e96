"""Forward on the CPU: the BLAS makes a block of logits, and folds make of it what is kept for each token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from cce_numba import logit
from cce_numba.arguments import Problem
from cce_numba.backend import Statistics
from cce_numba.cpu import folds as folds_
from cce_numba.cpu import invariant
from cce_numba.cpu.blocks import finish_logits, ranges, rows
from cce_numba.cpu.folds.fold import Given, Tile
from cce_numba.cpu.threads import for_each, spans
from cce_numba.cpu.tiles import CpuTiles
from cce_numba.integers import ceil_div
from cce_numba.parallel.bounds import HEAD
from cce_numba.parallel.shard import ELSEWHERE, IGNORED
from cce_numba.progress import advance


def counting_tokens(p: Problem) -> Any:
    """(n_valid,) the tokens that are not ignored, ascending."""
    return np.arange(p.N) if p.targets is None else np.flatnonzero(p.counts)


def target_logits(p: Problem, tokens: Any, block_n: int) -> Any:
    """(N,) of the compute dtype: the target's logit, 0 where ignored, NaN where the target is out of range.

    -inf where another rank has it. Of several targets the largest one, NaN where any is out of range.
    """
    if p.K is None:
        return _logits_of(p, p.targets, tokens, block_n)
    padding, largest = p.is_padding, np.full(p.N, -np.inf, p.compute_dtype)
    for k in range(p.K):
        own = np.where(padding[:, k], -np.inf, _logits_of(p, p.targets[:, k], tokens, block_n))
        largest = np.maximum(largest, own, dtype=p.compute_dtype)  # NaN if one is
    return np.where(p.counts, largest, p.compute_dtype.type(0))


def _logits_of(p: Problem, ids: Any, tokens: Any, block_n: int) -> Any:
    """(N,) of the compute dtype: the logit of the entry ids[n], for these tokens; NaN where it is out of range, else 0."""
    out = np.zeros(p.N, p.compute_dtype)
    for start, stop in ranges(len(tokens), block_n):
        block = tokens[start:stop]
        targets = ids[block]
        in_range = (targets >= 0) & (targets < p.V)
        safe = np.where(in_range, targets, 0)
        z = np.vecdot(rows(p.e, block, p.compute_dtype), p.c[safe].astype(p.compute_dtype, copy=False))
        bias, scale = (None if x is None else x[of] for x, of in ((p.bias, safe), (p.logit_scale, block)))
        logit.finish_in_place(z, bias, scale, p.options.softcap)
        elsewhere = p.shard is not None and targets == ELSEWHERE
        out[block] = np.where(in_range, z, np.where(elsewhere, -np.inf, np.nan))
    return out


def _lse_of_head(p: Problem, tiles: CpuTiles) -> Any:
    """(N,) the log-sum-exp of the first part of a shard, 0 where ignored: what other ranks are told before the first tile."""
    rows = ceil_div(p.V, HEAD)
    options = replace(p.options, entropy=False, sum_squares=False, top_k=0, label_smoothing=0.0)
    head = replace(
        p,
        c=p.c[:rows],
        bias=None if p.bias is None else p.bias[:rows],
        targets=np.where(p.counts, ELSEWHERE, IGNORED),
        class_weights=None,
        target_probs=None,
        options=options,
    )
    return forward(head, tiles, record_survivors=False).lse


def forward(p: Problem, tiles: CpuTiles, record_survivors: bool) -> Statistics:
    """What the folds of a problem find.

    Threads share the rows of a block of logits. What one of them has multiplied it takes to the folds, in tiles of tokens that
    share survivor bits.
    """
    tokens = counting_tokens(p)
    # Survivors want a bound of the log-sum-exp before the first tile.
    bound = target_logits(p, tokens, tiles.block_n) if record_survivors and p.targets is not None else None
    if bound is not None and p.bounds is not None:
        bound = p.bounds.of_all(bound, _lse_of_head(p, tiles))
    given = Given(p, tiles, tokens, bound)
    folds = folds_.of_problem(p, record_survivors)
    states = [fold.begin(given) for fold in folds]
    multiply = invariant.multiply if p.options.batch_invariant else np.matmul
    block_n, block_v = tiles.block_n, tiles.block_v
    z_buffer = np.empty(min(block_n, len(tokens)) * block_v, p.compute_dtype)
    n_blocks, v_blocks = ceil_div(len(tokens), block_n), ceil_div(p.V, block_v)
    for n_block, (n0, n1) in enumerate(ranges(len(tokens), block_n)):
        e = rows(p.e, tokens[n0:n1], p.compute_dtype)
        for v_block, (v0, v1) in enumerate(ranges(p.V, block_v)):
            z = z_buffer[: (n1 - n0) * (v1 - v0)].reshape(n1 - n0, v1 - v0)
            c = p.c[v0:v1].astype(p.compute_dtype, copy=False)

            def fold_rows(span: tuple[int, int], n0: int = n0, v0: int = v0, z: Any = z, e: Any = e, c: Any = c) -> None:
                some, columns = slice(*span), slice(v0, v0 + len(c))
                multiply(e[some], c.T, z[some])
                finish_logits(z[some], p, tokens[n0 + span[0] : n0 + span[1]], columns)
                for first in range(*span, tiles.survivor_block):
                    last = min(first + tiles.survivor_block, span[1])
                    tile = Tile(z[first:last], slice(n0 + first, n0 + last), columns)
                    for fold, state in zip(folds, states, strict=True):
                        fold.step(state, states[0], tile)

            for_each(fold_rows, spans(n1 - n0, tiles.survivor_block))
            advance("forward", n_block * v_blocks + v_block + 1, n_blocks * v_blocks)

    results: dict[str, Any] = {}
    for fold, state in zip(folds, states, strict=True):
        results |= fold.store(state, states[0], given)
    return Statistics(
        tokens=tokens,
        n_valid=np.array(len(tokens)),
        lse=results.pop("lse"),
        max_logit=results.pop("max_logit"),
        log_sum=results.pop("log_sum"),
        target_logit=results.pop("target_logit", None),
        survivors=results.pop("survivors", None),
        survivor_block=tiles.survivor_block,
        mean_logit=results.pop("mean_logit", None),
        draw_seed=results.pop("draw_seed", None),
        entropy=results.pop("entropy", None),
        sum_squares=results.pop("sum_squares", None),
        top_logits=results.pop("top_logits", None),
        top_ids=results.pop("top_ids", None),
        folded=results,
    )
