"""What the tensor-core kernels offer to `plan.Backend`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda

from cce_numba.arguments import Problem
from cce_numba.hopper import forward as forward_kernels
from cce_numba.hopper import tensor_map
from cce_numba.hopper.tiles import HopperTiles
from cce_numba.interchange import BFLOAT16
from cce_numba.plan import Gradients, Plan, Statistics
from cce_numba.simt import backend as simt

_DTYPES = (np.dtype(np.float16), BFLOAT16)


def why_not(p: Problem) -> str | None:
    """It takes 16-bit CuPy arrays on a GPU of compute capability 9.x."""
    if p.dtype not in _DTYPES:
        return f"its tensor cores take float16 and bfloat16, and the arrays are {p.dtype}"
    if simt.SIMULATED:
        return "Numba's simulator knows no tensor cores"
    if (reason := simt.why_not(p)) is not None:
        return reason
    major, minor = cuda.get_current_device().compute_capability[:2]
    if major != 9:
        return f"it needs compute capability 9.x (Hopper: H100, H200), and {p.device} has {major}.{minor}"
    return None


def plan(p: Problem) -> Plan:
    """Tiles and bytes."""
    tiles = HopperTiles()
    return Plan(
        backend="hopper",
        how="forward",
        tiles=tiles,
        forward_bytes=0,
        survivor_bytes=0,
        backward_bytes=simt.plan(p).backward_bytes,
    )


def indexed_dot(p: Problem, plan: Plan) -> Any:
    """See `plan.Backend`."""
    return simt.indexed_dot(p, plan)


def forward(p: Problem, plan: Plan, *, record_survivors: bool) -> Statistics:
    """See `plan.Backend`."""
    return forward_kernels.forward(p, plan.tiles, record_survivors)


def backward(
    p: Problem, plan: Plan, statistics: Statistics, softmax_weight: Any, target_weight: Any, wrt: frozenset[str]
) -> Gradients:
    """See `plan.Backend`: still the portable kernels."""
    return simt.backward(p, simt.plan(p), statistics, softmax_weight, target_weight, wrt)
