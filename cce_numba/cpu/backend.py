"""What the CPU path offers to `backend.Backend`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from cce_numba import arguments, terms
from cce_numba.arguments import Outline, Problem
from cce_numba.backend import Gradients, Statistics, StatisticsForm, Weights
from cce_numba.cpu import backward as backward_loops
from cce_numba.cpu import forward as forward_loops
from cce_numba.cpu import threads
from cce_numba.cpu.tiles import choose_tiles
from cce_numba.plan import Plan
from cce_numba.survivors import SURVIVOR_BLOCK

EXTRAS: frozenset[str] = arguments.EXTRAS - {"allow_tf32"}
ON_REQUEST: frozenset[np.dtype] = frozenset()
_LARGEST_USUAL_D = 2**14  # up to which tiles have whole blocks of survivors, whatever the other sizes are
_USUAL_FORM = StatisticsForm(tokens=np.dtype(np.int64), survivor_block=SURVIVOR_BLOCK)

_quiet = np.errstate(over="ignore", under="ignore", invalid="ignore", divide="ignore")  # inf and nan speak for themselves


def why_not(p: Outline | Problem) -> str | None:
    """It takes every problem whose arrays are on the host."""
    return f"the arrays are on {p.device}; this backend takes NumPy arrays" if p.on_device else None


def statistics_form(p: Outline | Problem) -> StatisticsForm:
    """See `backend.Backend`. Rows and tokens are those that count; the form has room for all."""
    if p.D <= _LARGEST_USUAL_D:
        return _USUAL_FORM
    return replace(_USUAL_FORM, survivor_block=choose_tiles(p).survivor_block)


def plan(p: Problem) -> Plan:
    """Blocks and bytes."""
    tiles = choose_tiles(p)
    itemsize = p.compute_dtype.itemsize
    accumulator = min(tiles.dE_group, p.N) * p.D * itemsize if p.grad_e_dtype != p.compute_dtype else 0
    blocks = tiles.block_bytes(p.D, itemsize)
    separate = ", dE and dC in separate passes" if tiles.dE_group < p.N else ""
    return Plan(
        backend="cpu",
        how=f"blocks of {tiles.block_v} vocabulary entries through the BLAS in {p.compute_dtype}{separate}",
        tiles=tiles,
        forward_bytes=blocks,
        survivor_bytes=statistics_form(p).survivor_bytes(p.N, p.V) if p.options.filters else 0,
        backward_bytes=blocks + accumulator,
        stored_logits_bytes=p.logits_bytes,
    )


@_quiet
def indexed_dot(p: Problem, plan: Plan) -> Any:
    """See `backend.Backend`."""
    with threads.of(p):
        return forward_loops.target_logits(p, forward_loops.counting_tokens(p), plan.tiles.block_n)


@_quiet
def forward(p: Problem, plan: Plan, *, record_survivors: bool, keep_logits: bool = False) -> Statistics:
    """See `backend.Backend`."""
    with threads.of(p):
        return forward_loops.forward(p, plan.tiles, record_survivors)


@_quiet
def reduced_nll(p: Problem, statistics: Statistics) -> Any:
    """See `backend.Backend`."""
    return terms.reduced_nll(p, statistics)


@_quiet
def nll_weight(p: Problem, statistics: Statistics, d_loss: Any) -> Any:
    """See `backend.Backend`."""
    return terms.nll_weight(p, statistics, d_loss)


@_quiet
def backward(p: Problem, plan: Plan, statistics: Statistics, weights: Weights, into: Gradients, adds: bool) -> None:
    """See `backend.Backend`."""
    with threads.of(p):
        backward_loops.backward(p, plan.tiles, statistics, weights, into, adds)
