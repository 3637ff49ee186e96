"""What the portable kernels offer to `backend.Backend`."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from cce_numba import gpu, terms
from cce_numba.arguments import DISTILLATION, FILTERED_DISTILLATION, SEVERAL_TARGETS, Outline, Problem
from cce_numba.backend import Gradients, Statistics, StatisticsForm, Weights
from cce_numba.gpu import SIMULATED
from cce_numba.integers import ceil_div
from cce_numba.plan import Plan
from cce_numba.simt import backward as backward_kernels
from cce_numba.simt import forward as forward_kernels
from cce_numba.simt import indexed_dot as indexed_dot_kernels
from cce_numba.simt.records import LogitTerms
from cce_numba.simt.tiles import choose_tiles
from cce_numba.simt.tokens import list_tokens

EXTRAS: frozenset[str] = frozenset(
    {"entropy", "sum_squares", "top_k", "batch_invariant", SEVERAL_TARGETS, DISTILLATION, FILTERED_DISTILLATION}
)
ON_REQUEST: frozenset[np.dtype] = frozenset()


def why_not(p: Outline | Problem) -> str | None:
    """It takes CuPy arrays on a GPU, or NumPy arrays in the simulator."""
    return None if SIMULATED else gpu.why_not(p.on_device)


def statistics_form(p: Outline | Problem) -> StatisticsForm:
    """See `backend.Backend`."""
    return _form(p.compute_dtype)


@functools.cache
def _form(compute_dtype: np.dtype) -> StatisticsForm:
    return StatisticsForm(tokens=np.dtype(np.int64), survivor_block=choose_tiles(compute_dtype, SIMULATED).survivor_block)


def plan(p: Problem) -> Plan:
    """Tiles and bytes."""
    tiles = choose_tiles(p.compute_dtype, SIMULATED)
    n_blocks = ceil_div(p.N, tiles.block_n)
    v_tiles = ceil_div(p.V, tiles.block_v)
    splits = forward_kernels.count_splits(n_blocks, v_tiles, p.options.batch_invariant) if p.N else 1
    chunk = backward_kernels.chunk_of(p, tiles)
    where = "Numba's simulator" if SIMULATED else p.device
    return Plan(
        backend="simt",
        how=f"portable kernels on {where}, computing in {p.compute_dtype}; vocabulary in {splits} splits per block of tokens "
        f"in the forward, in chunks of {chunk} in the backward",
        tiles=tiles,
        # Up to twice the splits (see forward_kernels._HEAD); or once, and float64 totals of logits beside them.
        forward_bytes=p.N * (2 * splits * forward_kernels.bytes_of_row(p) + 8),
        survivor_bytes=statistics_form(p).survivor_bytes(p.N, p.V) if p.options.filters else 0,
        backward_bytes=backward_bytes(p),
        stored_logits_bytes=p.logits_bytes,
    )


def backward_bytes(p: Problem) -> int:
    """Workspace of the backward: G of a chunk of the vocabulary, lists of its columns, and a sum for a rounded dE."""
    tiles = choose_tiles(p.compute_dtype, SIMULATED)
    itemsize, n_blocks, chunk = p.compute_dtype.itemsize, ceil_div(p.N, tiles.block_n), backward_kernels.chunk_of(p, tiles)
    lists = n_blocks * chunk * 8 * (1 if p.options.filter_e_grad == p.options.filter_c_grad else 2)
    accumulator = p.N * p.D * itemsize if p.grad_e_dtype != p.compute_dtype and chunk < p.V else 0
    return p.N * chunk * itemsize + lists + accumulator


def indexed_dot(p: Problem, plan: Plan) -> Any:
    """See `backend.Backend`."""
    return indexed_dot_kernels.indexed_dot(p, list_tokens(p), LogitTerms.of(p))


def forward(p: Problem, plan: Plan, *, record_survivors: bool, keep_logits: bool = False) -> Statistics:
    """See `backend.Backend`."""
    return forward_kernels.forward(p, plan.tiles, record_survivors)


def reduced_nll(p: Problem, statistics: Statistics) -> Any:
    """See `backend.Backend`."""
    return terms.reduced_nll(p, statistics)


def nll_weight(p: Problem, statistics: Statistics, d_loss: Any) -> Any:
    """See `backend.Backend`."""
    return terms.nll_weight(p, statistics, d_loss)


def backward(p: Problem, plan: Plan, statistics: Statistics, weights: Weights, into: Gradients, adds: bool) -> None:
    """See `backend.Backend`."""
    adds = terms.write_outer(p, weights.outer, into, adds)
    backward_kernels.backward(p, plan.tiles, statistics, weights, into, adds)
