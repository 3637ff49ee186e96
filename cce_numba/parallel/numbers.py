"""The numbers of a partial, packed for one gather: 12 bytes a token in float32, and 4 more for each of what folds add.

    max_logit      the largest logit of the shard; -inf of a shard without rows
    log_sum        logarithm of the sum of exp(logit - max_logit); -inf of a shard without rows
    target_logit   of each target; -inf where another rank has it, NaN where nobody does
    mean_logit     the shard's share of the vocabulary's mean of class weight times logit, where labels are smoothed
    entropy        of the shard's own distribution, where it is asked for
    sum_squares    of the shard's own probabilities, where it is asked for
    top_logits, top_ids   the shard's best entries, numbered in the whole vocabulary, where they are asked for

All are 0 of tokens that are ignored. They lie one after the other, as bytes: integers first, so that all are aligned.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from cce_numba import interchange
from cce_numba.arguments import Problem
from cce_numba.backend import Statistics, StatisticsForm
from cce_numba.parallel.shard import ELSEWHERE

Numbers = dict[str, Any]  # by name, (N,) or (N, K) or (N, k)


def of_statistics(p: Problem, found: Statistics, mean_logit: Any) -> Numbers:
    """A partial's numbers. mean_logit: (N,) the shard's share, or None."""
    assert p.shard is not None, "it is a problem of a shard"
    numbers: Numbers = {"max_logit": found.max_logit, "log_sum": found.log_sum}
    if found.target_logit is not None:
        numbers["target_logit"] = found.target_logit
    if mean_logit is not None:
        numbers["mean_logit"] = mean_logit
    if p.options.entropy:
        numbers["entropy"] = found.entropy
    if p.options.sum_squares:
        numbers["sum_squares"] = found.sum_squares
    if p.shard.top_k:
        numbers["top_logits"], numbers["top_ids"] = _best(p, found)
    return numbers


def _best(p: Problem, found: Statistics) -> tuple[Any, Any]:
    """(N, k) the shard's best entries; those that it does not have come after all that there are."""
    xp: Any = p.xp
    shard = p.shard
    assert shard is not None, "it is a problem of a shard"
    logits = xp.full((p.N, shard.top_k), -math.inf, p.compute_dtype)
    ids = xp.full((p.N, shard.top_k), shard.total, np.int64)
    if p.V:
        there = found.top_logits.shape[1]
        logits[:, :there], ids[:, :there] = found.top_logits, found.top_ids + shard.start
    return logits, ids


def of_no_rows(p: Problem, form: StatisticsForm) -> Statistics:
    """What is found of a shard without rows: nothing, of each token that counts. form: that of the backend."""
    xp: Any = p.xp
    counts = xp.ones(p.N, bool) if p.targets is None else p.counts
    nothing = xp.where(counts, p.compute_dtype.type(-math.inf), p.compute_dtype.type(0))
    target_logit = None
    if p.targets is not None:
        target_logit = xp.where(p.targets == ELSEWHERE, p.compute_dtype.type(-math.inf), p.compute_dtype.type(math.nan))
        target_logit = xp.where(p.is_padding, p.compute_dtype.type(0), target_logit)
    zero = xp.zeros(p.N, p.compute_dtype)
    return Statistics(
        tokens=xp.argsort(~counts, kind="stable").astype(form.tokens),
        n_valid=xp.asarray(counts.sum(dtype=np.int64)),
        lse=nothing,
        max_logit=nothing,
        log_sum=nothing,
        target_logit=target_logit,
        survivors=None,
        survivor_block=form.survivor_block,
        mean_logit=zero,
        entropy=zero if p.options.entropy else None,
        sum_squares=zero if p.options.sum_squares else None,
    )


def packed(numbers: Numbers) -> Any:
    """(bytes,) uint8."""
    parts = [_bytes_of(numbers[name]) for name in _in_order(numbers)]
    xp: Any = interchange.array_module(parts[0])
    return xp.concatenate(parts)


def unpacked(every: Any, like: Numbers) -> list[Numbers]:
    """The numbers of each row of `every` (ranks, bytes); `like`: those of a rank, which tell names, shapes and dtypes."""
    result: list[Numbers] = []
    for row in every:
        numbers, place = {}, 0
        for name in _in_order(like):
            array = like[name]
            size = array.size * array.itemsize
            numbers[name] = row[place : place + size].view(array.dtype).reshape(array.shape)
            place += size
        if place != row.size:
            raise ValueError(f"numbers: must be those of the same tokens and options, {place} bytes, got {row.size}")
        result.append(numbers)
    return result


def _in_order(numbers: Numbers) -> Iterator[str]:
    return iter(sorted(numbers, key=lambda name: (-numbers[name].itemsize, name)))


def _bytes_of(array: Any) -> Any:
    xp: Any = interchange.array_module(array)
    return xp.ascontiguousarray(array).reshape(-1).view(np.uint8)
