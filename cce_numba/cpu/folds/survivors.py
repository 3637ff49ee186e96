"""Survivors: the vocabulary entries whose logits the backward computes again; one bit for each block of tokens and entry.

An entry is dropped in a block if its probability is known to be below eps for every token of the block. It is known for a token
if the logit is below bound + log(eps), where the bound is no larger than the token's log-sum-exp: the larger of the target's
logit and the log-sum-exp of what was seen so far. A target survives in any case, and so does NaN. `cce_numba/survivors.py` has
the rule.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

import numpy as np

from cce_numba import folds
from cce_numba import survivors as rule
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
    target_logit: Any  # (n_valid,) of the compute dtype: a first bound of the log-sum-exp, NaN for a target out of range
    log_eps: float  # natural log of the threshold, with some slack


class Survivors:
    """The fold."""

    name: ClassVar[str] = folds.SURVIVORS

    def begin(self, given: Given) -> State:
        """See `fold.Fold`."""
        p, block = given.problem, given.tiles.survivor_block
        bits = np.zeros((ceil_div(len(given.tokens), block), ceil_div(p.V, 8)), np.uint8)
        return State(bits, block, given.bound[given.tokens], rule.log_threshold(p.options.filter_eps))

    def step(self, state: State, first_state: MaxSumState, tile: Tile) -> None:
        """See `fold.Fold`."""
        rows = tile.rows
        flags = np.zeros(tile.logits.shape[1], bool)
        _flag_columns(
            tile.logits, first_state.largest[rows], first_state.sum[rows], state.target_logit[rows], state.log_eps, flags
        )
        packed, first_byte = np.packbits(flags, bitorder="little"), tile.columns.start // 8
        state.bits[rows.start // state.block, first_byte : first_byte + len(packed)] |= packed

    def merge(self, state: State, later: State) -> State:
        """See `fold.Fold`."""
        return state._replace(bits=state.bits | later.bits)

    def store(self, state: State, first_state: MaxSumState, given: Given) -> dict[str, Any]:
        """See `fold.Fold`. Where nearly all survive, picking columns would cost more than it saves: None, and all do."""
        p, bits = given.problem, state.bits
        lost = np.isnan(first_state.log_sum_exp()) | np.isnan(state.target_logit)
        # The gradient of a token whose loss is NaN is NaN in every column: all survive in its block.
        bits[np.unique(np.flatnonzero(lost) // state.block)] = np.packbits(np.ones(p.V, bool), bitorder="little")
        kept = np.flatnonzero(~lost)
        targets = p.targets[given.tokens[kept]]
        np.bitwise_or.at(bits, (kept // state.block, targets >> 3), (1 << (targets & 7)).astype(np.uint8))
        share = np.bitwise_count(bits).sum(dtype=np.int64)
        return {"survivors": None if share > rule.DENSE_SHARE * len(bits) * p.V else bits}


@compiled(nogil=True)
def _flag(row: Any, threshold: Any, flags: Any) -> None:
    """Flags what is not below the threshold; NaN is not below anything."""
    for v in range(row.shape[0]):
        flags[v] |= not (row[v] < threshold)


@compiled(nogil=True)
def _flag_columns(z: Any, largest: Any, total: Any, target_logit: Any, log_eps: float, flags: Any) -> None:
    """Flags, in flags (v,) bool, the columns of logits z (n, v) that some row does not drop; the other arrays are (n,)."""
    for n in range(z.shape[0]):
        bound = np.float64(target_logit[n])
        if total[n] > 0:
            shift = 0.0 if largest[n] == -np.inf else largest[n]
            if math.log(total[n]) + shift > bound:
                bound = np.float64(math.log(total[n]) + shift)
        _flag(z[n], rounded(_threshold(bound, log_eps), z), flags)
