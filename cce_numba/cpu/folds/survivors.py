"""Survivors: the vocabulary entries whose logits the backward computes again; one bit for each block of tokens and entry.

An entry is dropped in a block if its probability is known to be below eps for every token of the block. It is known for a token
if the logit is below bound + log(eps), where the bound is no larger than the token's log-sum-exp: the larger of the target's
logit and the log-sum-exp of what was seen so far. A target survives in any case, and so does NaN. The unbiased filter has a
threshold eps * u for each column instead, with draws u in (0, 1). `cce_numba/survivors.py` has the rules.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

import numpy as np

from cce_numba import folds
from cce_numba import survivors as rule
from cce_numba.arguments import Problem
from cce_numba.cpu.compiled import compiled
from cce_numba.cpu.elements import rounded
from cce_numba.cpu.folds.fold import Given, Tile
from cce_numba.cpu.folds.max_sum import State as MaxSumState
from cce_numba.integers import ceil_div

_threshold = compiled(nogil=True)(rule.make_threshold(np.float64))


class State(NamedTuple):
    """Of each block of counting tokens; and what a step needs."""

    bits: Any  # (n_blocks, ceil(V / 8)) uint8, little-endian over the vocabulary
    block: int  # tokens of a block
    target_logit: Any  # (n_valid,) of the compute dtype: a first bound of the log-sum-exp, NaN if a target is out of range
    log_eps: float  # natural log of the threshold, with some slack
    seed: Any  # 0-d int64: of the draws of the unbiased filter, or None for the one that drops


class Survivors:
    """The fold."""

    name: ClassVar[str] = folds.SURVIVORS

    def begin(self, given: Given) -> State:
        """See `fold.Fold`."""
        p, block = given.problem, given.tiles.survivor_block
        bits = np.zeros((ceil_div(len(given.tokens), block), ceil_div(p.V, 8)), np.uint8)
        seed = _draw_seed(p) if p.options.is_unbiased else None
        return State(bits, block, given.bound[given.tokens], rule.log_threshold(p.options.filter_eps), seed)

    def step(self, state: State, first_state: MaxSumState, tile: Tile) -> None:
        """See `fold.Fold`."""
        rows, columns = tile.rows, tile.columns
        flags = np.zeros(tile.logits.shape[1], bool)
        found = first_state.largest[rows], first_state.sum[rows], state.target_logit[rows]
        if state.seed is None:
            _flag_columns(tile.logits, *found, state.log_eps, flags)
        else:
            u = rule.draws(rows.start // state.block, np.arange(columns.start, columns.stop), state.seed)
            log_eps = (state.log_eps + np.log(u.astype(np.float64))).astype(tile.logits.dtype)
            _flag_columns_by_chance(tile.logits, *found, log_eps, flags)
        packed, first_byte = np.packbits(flags, bitorder="little"), tile.columns.start // 8
        state.bits[rows.start // state.block, first_byte : first_byte + len(packed)] |= packed

    def merge(self, state: State, later: State) -> State:
        """See `fold.Fold`."""
        return state._replace(bits=state.bits | later.bits)

    def store(self, state: State, first_state: MaxSumState, given: Given) -> dict[str, Any]:
        """See `fold.Fold`. Where nearly all survive, picking columns would cost more than it saves: None, and all do.

        Not with the unbiased filter: gradients would depend on what many draws are together, and be right on average no more.
        """
        p, bits = given.problem, state.bits
        lost = np.isnan(first_state.log_sum_exp()) | np.isnan(state.target_logit)
        # The gradient of a token whose loss is NaN is NaN in every column: all survive in its block.
        bits[np.unique(np.flatnonzero(lost) // state.block)] = np.packbits(np.ones(p.V, bool), bitorder="little")
        kept = np.flatnonzero(~lost)
        targets, present = (x[given.tokens[kept]] for x in (p.targets, ~p.is_padding))
        block = np.broadcast_to((kept // state.block).reshape(-1, *[1] * (targets.ndim - 1)), targets.shape)[present]
        targets = targets[present]
        if p.shard is not None:  # others have their targets elsewhere
            block, targets = block[targets >= 0], targets[targets >= 0]
        np.bitwise_or.at(bits, (block, targets >> 3), (1 << (targets & 7)).astype(np.uint8))
        if state.seed is not None:
            return {"survivors": bits, "draw_seed": state.seed}
        return {"survivors": unless_dense(bits, p.V)}


def unless_dense(bits: Any, V: int) -> Any:
    """The bits (n_blocks, ceil(V / 8)) of the filter that drops, or None if nearly all survive: then all do."""
    return None if np.bitwise_count(bits).sum(dtype=np.int64) > rule.DENSE_SHARE * len(bits) * V else bits


def _draw_seed(p: Problem) -> Any:
    """0-d int64: by the targets' numbers in the whole vocabulary, and with the shard's first entry in the high word."""
    if p.shard is None:
        return rule.draw_seed(p.targets[~p.is_padding], p.filter_seed)
    return np.array(rule.draw_seed(p.shard.targets[~p.is_padding], p.filter_seed) + p.shard.of_seed)


@compiled(nogil=True)
def _flag(row: Any, threshold: Any, flags: Any) -> None:
    """Flags what is not below the threshold; NaN is not below anything."""
    for v in range(row.shape[0]):
        flags[v] |= not (row[v] < threshold)


@compiled(nogil=True)
def _bound(largest: Any, total: Any, target_logit: Any) -> Any:
    """A lower bound of a token's log-sum-exp, float64: its target's logit, or the log-sum-exp so far."""
    bound = np.float64(target_logit)
    if total > 0:
        shift = 0.0 if largest == -np.inf else largest
        if math.log(total) + shift > bound:
            bound = np.float64(math.log(total) + shift)
    return bound


@compiled(nogil=True)
def _flag_columns(z: Any, largest: Any, total: Any, target_logit: Any, log_eps: float, flags: Any) -> None:
    """Flags, in flags (v,) bool, the columns of logits z (n, v) that some row does not drop; the other arrays are (n,)."""
    for n in range(z.shape[0]):
        bound = _bound(largest[n], total[n], target_logit[n])
        _flag(z[n], rounded(_threshold(bound, log_eps), z), flags)


@compiled(nogil=True)
def _flag_columns_by_chance(z: Any, largest: Any, total: Any, target_logit: Any, log_eps: Any, flags: Any) -> None:
    """As `_flag_columns`, with a threshold for each column: log_eps (v,) of z's dtype."""
    for n in range(z.shape[0]):
        bound = _bound(largest[n], total[n], target_logit[n])
        row, least = z[n], rounded(_threshold(bound, 0.0), z)
        for v in range(row.shape[0]):
            flags[v] |= not (row[v] < least + log_eps[v])
