"""What is true of the whole vocabulary, out of each rank's numbers: with array operations, in the order of ranks.

The log-sum-exp of a token is that of its shards' log-sum-exps lse_i, so shard i has the share w_i = exp(lse_i - lse) of the
token's probability. Then, with the entropies H_i and the sums of squares q_i of the shards' own distributions,

    entropy       the sum of w_i * (H_i + lse - lse_i)
    sum_squares   the sum of w_i**2 * q_i

A share of 0 adds 0, whatever the shard's numbers are. Every rank computes the same from the same numbers, so all ranks have the
same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from cce_numba.arguments import Problem
from cce_numba.backend import Statistics
from cce_numba.parallel.numbers import Numbers


def merged(p: Problem, own: Statistics, every: Sequence[Numbers]) -> Statistics:
    """The statistics of the whole vocabulary, but for survivors and seed, which stay the shard's own.

    p, own: this rank's problem, and what it has found. every: all ranks' numbers, in the order of ranks.
    """
    xp: Any = p.xp
    dtype, counts = p.compute_dtype, xp.ones(p.N, bool) if p.targets is None else p.counts
    with np.errstate(all="ignore"):  # inf and nan speak for themselves
        # float64, so that a merge of many ranks loses nothing; a NaN is in the sums, and in no maximum.
        largest = xp.stack([numbers["max_logit"] for numbers in every]).astype(np.float64)
        log_sums = xp.stack([numbers["log_sum"] for numbers in every]).astype(np.float64)
        max_logit = _fmax(xp, largest)
        shift = xp.where(max_logit == -np.inf, 0.0, max_logit)  # exp(-inf - 0) is 0, where exp(-inf - -inf) is NaN
        parts = xp.exp((largest - shift) + log_sums)
        total = _in_order(parts)
        log_sum = xp.log(total)
        shares = parts / total

        def of_tokens(array: Any) -> Any:
            return xp.where(counts if array.ndim == 1 else counts[:, None], array, 0).astype(array.dtype)

        def result(array: Any) -> Any:
            return of_tokens(array.astype(dtype))

        found = replace(
            own, max_logit=result(max_logit), log_sum=result(log_sum), lse=result(max_logit + log_sum), mean_logit=None
        )
        names = every[0].keys()
        if "target_logit" in names:
            targets = xp.stack([numbers["target_logit"] for numbers in every])
            found = replace(found, target_logit=targets.max(axis=0))
        if "mean_logit" in names:
            means = xp.stack([numbers["mean_logit"] for numbers in every]).astype(np.float64)
            found = replace(found, mean_logit=result(_in_order(means)))
        if "entropy" in names:
            inner = xp.stack([numbers["entropy"] for numbers in every]).astype(np.float64)
            farther = (max_logit - largest) + (log_sum - log_sums)  # lse - lse_i
            found = replace(found, entropy=result(_in_order(xp.where(shares == 0, 0.0, shares * (inner + farther)))))
        if "sum_squares" in names:
            squares = xp.stack([numbers["sum_squares"] for numbers in every]).astype(np.float64)
            found = replace(found, sum_squares=result(_in_order(xp.where(shares == 0, 0.0, shares * shares * squares))))
        if "top_ids" in names:
            assert p.shard is not None, "it is a problem of a shard"
            logits, ids = _best(xp, every, p.shard.total)
            found = replace(found, top_logits=of_tokens(logits), top_ids=of_tokens(ids))
    return found


def _in_order(parts: Any) -> Any:
    """The sum over the first axis, one after the other."""
    total = parts[0].copy()
    for part in parts[1:]:
        total += part
    return total


def _fmax(xp: Any, parts: Any) -> Any:
    result = parts[0]
    for part in parts[1:]:
        result = xp.fmax(result, part)
    return result


def _best(xp: Any, every: Sequence[Numbers], total: int) -> tuple[Any, Any]:
    """(N, k) the best of all ranks' best entries, which are in order: by descending logit, then by ascending entry."""
    logits = xp.concatenate([numbers["top_logits"] for numbers in every], axis=1)
    ids = xp.concatenate([numbers["top_ids"] for numbers in every], axis=1)
    k = every[0]["top_ids"].shape[1]
    # Ranks have ascending entries, and each rank's are in order. So stable sorts keep equal logits in order: first behind all
    # others those places that no entry is in, then by the logits.
    order = xp.argsort((ids >= total).astype(np.int8), axis=1, kind="stable")
    logits, ids = xp.take_along_axis(logits, order, axis=1), xp.take_along_axis(ids, order, axis=1)
    order = xp.argsort(-xp.where(xp.isnan(logits), -np.inf, logits), axis=1, kind="stable")[:, :k]
    return xp.take_along_axis(logits, order, axis=1), xp.take_along_axis(ids, order, axis=1)
