"""What the portable kernels offer to `plan.Backend`."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

from numba import cuda

from cce_numba import reduction
from cce_numba.arguments import Problem
from cce_numba.plan import Gradients, Plan, Statistics, ceil_div, survivor_bytes
from cce_numba.simt import backward as backward_kernels
from cce_numba.simt import forward as forward_kernels
from cce_numba.simt import indexed_dot as indexed_dot_kernels
from cce_numba.simt.launch import SIMULATED
from cce_numba.simt.tiles import choose_tiles
from cce_numba.simt.tokens import list_tokens


def why_not(p: Problem) -> str | None:
    """It takes CuPy arrays on a GPU, or NumPy arrays in the simulator."""
    if SIMULATED:
        return None
    if p.on_device:
        return _missing_compiler()
    if importlib.util.find_spec("cupy") is None:
        return "the arrays are on the host, and CuPy, which GPU arrays need, is not installed: pip install 'cce_numba[cuda13]'"
    if not cuda.is_available():
        return "the arrays are on the host, and no NVIDIA GPU with a working driver was found"
    return "the arrays are on the host: move them with cupy.asarray(...)"


@functools.cache
def _missing_compiler() -> str | None:
    """Why Numba cannot compile kernels here, or None."""
    try:
        importlib.import_module("numba.cuda.cudadrv.nvvm").NVVM()
    except Exception as error:
        return (
            f"numba-cuda finds no compiler ({type(error).__name__}): pip install 'cce_numba[cuda13]' (or cuda12, to match the "
            "driver)"
        )
    return None


def plan(p: Problem) -> Plan:
    """Tiles and bytes."""
    tiles = choose_tiles(p.compute_dtype, SIMULATED)
    itemsize, n_blocks = p.compute_dtype.itemsize, ceil_div(p.N, tiles.block_n)
    splits = forward_kernels.count_splits(n_blocks, ceil_div(p.V, tiles.block_v)) if p.N else 1
    chunk = backward_kernels.chunk_of(p, tiles)
    where = "Numba's simulator" if SIMULATED else p.device
    return Plan(
        backend="simt",
        how=f"portable kernels on {where}, computing in {p.compute_dtype}; vocabulary in {splits} splits per block of tokens "
        f"in the forward, in chunks of {chunk} in the backward",
        tiles=tiles,
        # Up to twice the splits (see forward_kernels._HEAD); or once, and float64 totals of logits beside them.
        forward_bytes=p.N * (4 * splits * itemsize + 8),
        survivor_bytes=survivor_bytes(p, tiles.survivor_block) if p.options.filters else 0,
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
    """See `plan.Backend`."""
    return indexed_dot_kernels.indexed_dot(p, *list_tokens(p))


def forward(p: Problem, plan: Plan, *, record_survivors: bool) -> Statistics:
    """See `plan.Backend`."""
    return forward_kernels.forward(p, plan.tiles, record_survivors)


def reduced_nll(p: Problem, statistics: Statistics) -> Any:
    """See `plan.Backend`."""
    return reduction.reduced_nll(p, statistics)


def backward(
    p: Problem,
    plan: Plan,
    statistics: Statistics,
    softmax_weight: Any,
    target_weight: Any,
    uniform_weight: Any,
    into: Gradients,
    accumulate: bool,
) -> None:
    """See `plan.Backend`."""
    backward_kernels.backward(p, plan.tiles, statistics, softmax_weight, target_weight, uniform_weight, into, accumulate)
