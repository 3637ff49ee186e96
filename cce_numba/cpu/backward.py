"""Backward on the CPU: recompute the surviving logits of a block, turn them into G, and multiply.

Vocabulary blocks are the outer loop, so that a block of `dC` is complete, and rounded once, before the next one starts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from cce_numba.arguments import Problem
from cce_numba.backend import Gradients, Statistics, Weights
from cce_numba.cpu import invariant
from cce_numba.cpu.blocks import class_weights, finish_logits, ranges, rows
from cce_numba.cpu.elements import add_rows, column_scales, gradient_block, scales_of_columns
from cce_numba.cpu.threads import at_most, for_each, multiply, spans
from cce_numba.cpu.tiles import CpuTiles
from cce_numba.integers import ceil_div
from cce_numba.progress import advance
from cce_numba.survivors import draws
from cce_numba.terms import outer_product

_ROWS_OF_A_THREAD = 128  # of G, at a time
_FEWEST_DIMENSIONS = 64  # of dC, that are worth a product of their own
_ROWS_TO_FINISH = 512  # at a time: adding to what is there takes a copy of it


@dataclass(eq=False)
class _Part:
    """Some tokens, and what the gradients take of a block of the vocabulary for them; columns count from the block's first.

    Attributes:
        tokens: (n,) those that take part.
        block: number of the block of counting tokens that they are from, where something is filtered.
        columns: (k,) of which G is made; None means all of the block.
        for_e, for_c: those that dE, and dC and dbias, are made of; None means all.
        e: (n, D) rows of the tokens.
        g: (n, columns of for_c) G.
    """

    tokens: Any
    block: int
    columns: Any
    for_e: Any
    for_c: Any
    e: Any = None
    g: Any = None


def backward(
    p: Problem,
    tiles: CpuTiles,
    statistics: Statistics,
    weights: Weights,
    into: Gradients,
    adds: bool,
    fill: Callable[[Any, Any, Any], Any] | None = None,
) -> None:
    """Writes the gradients `into` arrays, or adds to what is in there; see `backend.Backend`.

    fill(z, tokens, entries): turns logits (n, v) of these tokens and entries, a slice or integers, into G, in place of what the
        weights say, which then only tell which tokens take part. It returns (v,) what the unbiased filter decides by: the
        natural logarithm of the largest probability of each entry, NaN if a token is lost.
    """
    tokens = statistics.tokens
    if into.e is None or into.e.dtype == p.compute_dtype or tiles.dE_group >= len(tokens):
        sweeps = [(0, len(tokens), into.e, into.c, into.bias)]
    else:
        sweeps = [(first, last, into.e, None, None) for first, last in ranges(len(tokens), tiles.dE_group)]
        sweeps += [(0, len(tokens), None, into.c, into.bias)]
    if p.options.is_unbiased and p.options.filter_eps_e != p.options.filter_eps_c:  # G is multiplied for one, not for the other
        sweeps = [each for sweep in sweeps for each in ((*sweep[:3], None, None), (*sweep[:2], None, *sweep[3:]))]
        sweeps = [sweep for sweep in sweeps if any(gradient is not None for gradient in sweep[2:])]
    steps = ceil_div(p.V, tiles.block_v)
    for done, (first, last, *gradients) in enumerate(sweeps):
        for step in _sweep(p, tiles, statistics, weights, adds, fill, first, last, *gradients):
            advance("backward", done * steps + step, len(sweeps) * steps)


def _sweep(
    p: Problem,
    tiles: CpuTiles,
    statistics: Statistics,
    weights: Weights,
    adds: bool,
    fill: Callable[[Any, Any, Any], Any] | None,
    first: int,
    last: int,
    d_e: Any,
    d_c: Any,
    d_bias: Any,
) -> Any:
    """Adds to d_e what comes from the counting tokens [first, last), writes or adds to d_c and d_bias; yields after each block.

    d_e (N, D), d_c (V, D), d_bias (V,), each may be None. Sums are kept in the compute dtype: in the gradient itself where
    that will do, else in a buffer that is rounded once.
    """
    dtype, outer = p.compute_dtype, weights.outer or Gradients()
    recorded = statistics.survivors is not None
    filter_e = recorded and d_e is not None and p.options.filter_eps_e is not None
    filter_c = recorded and (d_c is not None or d_bias is not None) and p.options.filter_eps_c is not None
    filter_all = (filter_e or d_e is None) and (filter_c or (d_c is None and d_bias is None))
    by_chance = filter_all and statistics.draw_seed is not None
    product = invariant.multiply if p.options.batch_invariant else multiply
    step = tiles.survivor_block if filter_e or filter_c else tiles.block_n
    d_e_sum = d_e if d_e is None or d_e.dtype == dtype else np.zeros((last - first, p.D), dtype)
    # The BLAS writes to contiguous rows alone. And it costs less accuracy to add the old gradient at the end of a sum.
    d_c_sums_itself = d_c is not None and d_c.dtype == dtype and d_c.flags.c_contiguous and not adds
    for v_block, (v0, v1) in enumerate(ranges(p.V, tiles.block_v)):
        c = np.ascontiguousarray(p.c[v0:v1], dtype)
        d_c_sum = None if d_c is None else d_c[v0:v1] if d_c_sums_itself else np.zeros((v1 - v0, p.D), dtype)
        if d_c_sums_itself:
            d_c[v0:v1] = 0
        d_bias_sum = np.zeros(v1 - v0)

        def part_of(span: tuple[int, int], v0: int = v0, v1: int = v1) -> _Part:
            position = first + span[0]
            tokens = weights.taking_part(statistics.tokens[position : first + span[1]])
            kept = _kept_columns(statistics, position, v0, v1) if filter_e or filter_c else None
            for_e, for_c = kept if filter_e else None, kept if filter_c else None
            return _Part(tokens, position // tiles.survivor_block, kept if filter_all else None, for_e, for_c)

        def find(part: _Part, v0: int = v0, c: Any = c) -> None:
            """Finds G for the part's tokens, and adds to their rows of dE, which are nobody else's."""
            part.e, block = rows(p.e, part.tokens, dtype), slice(v0, v0 + len(c))
            present = _rows(c, part.columns)
            g = product(part.e, present.T)
            entries = block if part.columns is None else part.columns + v0
            finish_logits(g, p, part.tokens, entries)
            largest = None if fill is None else fill(g, part.tokens, entries)
            scales = None
            if by_chance:
                if largest is None:
                    scales = _scales(p, statistics, part, g, block)
                else:
                    scales = np.ones(g.shape[1], dtype)
                    scales_of_columns(largest, _draws(statistics, part, block), p.options.filter_eps, scales)
                survives = np.flatnonzero(scales)
                if len(survives) < len(scales):
                    g, scales, present = g[:, survives], scales[survives], present[survives]
                    part.columns = survives if part.columns is None else part.columns[survives]
                    part.for_e, part.for_c = (part.columns if filters else None for filters in (filter_e, filter_c))
            if fill is None:
                _make_gradient(g, p, statistics, weights, part, block)
            if scales is not None:
                g *= scales
            if d_e is not None:
                wanted = present if part.for_e is part.columns else _rows(c, part.for_e)
                partial = product(_columns(g, part.columns, part.for_e), wanted)
                own = part.tokens if d_e_sum is d_e else np.searchsorted(statistics.tokens[first:last], part.tokens)
                d_e_sum[own] += partial
            part.g = None if d_c is None and d_bias is None else _columns(g, part.columns, part.for_c)

        for n0, n1 in ranges(last - first, tiles.block_n):
            parts = [part_of((n0 + start, n0 + stop)) for start, stop in ranges(n1 - n0, step)]
            parts = [part for part in parts if len(part.tokens) and (part.columns is None or len(part.columns))]
            if len(parts) == 1:
                find(parts[0])  # whose products are shared among threads
            elif parts:
                # Each thread has a copy of the rows of c that survive. All of them together fit where two blocks of c do.
                most = max(0 if part.columns is None else len(part.columns) for part in parts)
                with at_most(2 * tiles.block_v // max(1, most)):
                    for_each(find, parts)
            if d_c is not None:
                _add_to_d_c(d_c_sum, parts)
            if d_bias is not None:
                for part in parts:
                    d_bias_sum[slice(None) if part.for_c is None else part.for_c] += part.g.sum(axis=0, dtype=np.float64)
        if d_c is not None:
            _add_outer(d_c_sum, outer.c, range(v0, v1))
            if not d_c_sums_itself:
                _finish(d_c[v0:v1], None, d_c_sum, adds)
        if d_bias is not None:
            _add_outer(d_bias_sum[:, None], outer.bias, range(v0, v1))
            _finish(d_bias[v0:v1], None, d_bias_sum, adds)
        yield v_block + 1
    if d_e is not None and d_e_sum is d_e:
        _add_outer(d_e, outer.e, range(p.N))
    elif d_e is not None:
        _add_outer(d_e_sum, outer.e, statistics.tokens[first:last])
        _finish(d_e, statistics.tokens[first:last], d_e_sum, adds)


def _add_outer(total: Any, pair: Any, rows: Any) -> None:
    """Adds these rows (a sequence) of the outer product `pair`, of `Weights.outer`, to the sums; nothing to do for None."""
    if pair is not None:
        for start, stop in ranges(len(total), _ROWS_TO_FINISH):
            some = rows[start:stop]
            total[start:stop] += outer_product(pair, slice(some.start, some.stop) if isinstance(some, range) else some)


def _add_to_d_c(d_c_sum: Any, parts: list[_Part]) -> None:
    """Adds G.T @ e of each part to d_c_sum (v, D). Threads share the hidden dimensions, so each adds in the same order."""
    if len(parts) == 1 and parts[0].for_c is None:
        d_c_sum += multiply(parts[0].g.T, parts[0].e)
        return

    def add(span: tuple[int, int]) -> None:
        some = slice(*span)
        for part in parts:
            product = part.g.T @ part.e[:, some]
            if part.for_c is None:
                d_c_sum[:, some] += product
            else:
                add_rows(d_c_sum[:, some], part.for_c, product)

    for_each(add, spans(d_c_sum.shape[1], _FEWEST_DIMENSIONS))


def _finish(gradient: Any, tokens: Any, total: Any, adds: bool) -> None:
    """Rounds `total` to the gradient's rows of these tokens (None: to all), or adds it to them; overwrites `total`."""
    for start, stop in ranges(len(total), _ROWS_TO_FINISH):
        rows, part = slice(start, stop) if tokens is None else tokens[start:stop], total[start:stop]
        if adds:
            part += gradient[rows].astype(total.dtype, copy=False)
        gradient[rows] = part


def _kept_columns(statistics: Statistics, position: int, v0: int, v1: int) -> Any:
    """Survivors of [v0, v1), counted from v0, in the block of the counting token at `position`; None means all."""
    bits = statistics.survivors[position // statistics.survivor_block, v0 // 8 : ceil_div(v1, 8)]
    kept = np.flatnonzero(np.unpackbits(bits, count=v1 - v0, bitorder="little"))
    return None if len(kept) == v1 - v0 else kept


def _rows(c: Any, kept: Any) -> Any:
    return c if kept is None else c[kept]


def _columns(g: Any, present: Any, wanted: Any) -> Any:
    """The wanted columns of g, whose columns are those that are present."""
    return g if wanted is present else g[:, wanted]


def _scales(p: Problem, statistics: Statistics, part: _Part, z: Any, block: slice) -> Any:
    """(k,) what the unbiased filter multiplies columns of G by, of a part with logits z (n, k); 0 drops one."""
    tokens, columns = part.tokens, part.columns
    scales = np.ones(z.shape[1], z.dtype)
    max_logit, log_sum = statistics.max_logit[tokens], statistics.log_sum[tokens]
    if not np.isfinite(max_logit + log_sum).all() or np.isnan(statistics.target_logit[tokens]).any():  # of any target
        return scales  # a token is lost
    assert p.options.filter_eps is not None, "otherwise there is no seed"
    column_scales(z, max_logit, log_sum, _draws(statistics, part, block), p.options.filter_eps, scales)
    target_column = _target_columns(p, tokens, columns, block)
    scales[target_column[target_column >= 0]] = 1
    return scales


def _draws(statistics: Statistics, part: _Part, block: slice) -> Any:
    """(k,) the draws of the part's columns."""
    entries = np.arange(block.start, block.stop) if part.columns is None else block.start + part.columns
    return draws(part.block, entries, statistics.draw_seed)


def _target_columns(p: Problem, tokens: Any, columns: Any, block: slice) -> Any:
    """(n, K) where each token's targets stand among the columns (None means all of the block), or -1; K is 1 for (N,)."""
    targets = p.targets[tokens]
    # Padding may be a number that is an entry, too.
    wanted = np.where(targets == p.options.ignore_index, -1, targets - block.start).reshape(len(tokens), p.K or 1)
    if columns is None:
        return np.where((wanted >= 0) & (wanted < block.stop - block.start), wanted, -1)
    if len(columns) == 0:
        return np.full(wanted.shape, -1)
    found = np.searchsorted(columns, wanted).clip(max=len(columns) - 1)
    return np.where(columns[found] == wanted, found, -1)


def _make_gradient(z: Any, p: Problem, statistics: Statistics, weights: Weights, part: _Part, block: slice) -> None:
    """Turns the logits z (n, k) of the part's tokens and columns, of this block of the vocabulary, into G, in place."""
    tokens = part.tokens
    inverse_softcap = z.dtype.type(0 if p.options.softcap is None else 1 / p.options.softcap)
    # A token with a target out of range has a loss of NaN, and must not get a finite gradient.
    lost = np.isnan(statistics.target_logit[tokens]).reshape(len(tokens), -1).any(axis=1)
    softmax_weight = np.where(lost, np.nan, weights.softmax[tokens])
    per_token = (
        statistics.max_logit[tokens],
        statistics.log_sum[tokens],
        softmax_weight.astype(z.dtype, copy=False),
        (weights.softmax if weights.entropy is None else weights.entropy)[tokens],
        weights.target[tokens].reshape(len(tokens), -1),
        (weights.softmax if weights.uniform is None else weights.uniform)[tokens],
        _target_columns(p, tokens, part.columns, block),
    )
    # Nothing is filtered where there is such a term: all columns of the block are here.
    of_class = np.empty(0, z.dtype) if weights.uniform is None else class_weights(p, block)

    def fill(span: tuple[int, int]) -> None:
        some = slice(*span)
        gradient_block(z[some], *(x[some] for x in per_token), of_class, inverse_softcap, weights.entropy is not None)

    for_each(fill, ranges(len(tokens), _ROWS_OF_A_THREAD))
