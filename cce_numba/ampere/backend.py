"""What the `mma.sync` kernels offer to `backend.Backend`."""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from cce_numba import gpu, terms
from cce_numba.ampere.elements import elements_of
from cce_numba.ampere.tiles import AmpereTiles, tiles_for
from cce_numba.arguments import SEVERAL_TARGETS, Outline, Problem
from cce_numba.backend import Gradients, Statistics, StatisticsForm, Weights
from cce_numba.interchange import BFLOAT16
from cce_numba.plan import Plan
from cce_numba.survivors import coarse_eps_of
from cce_numba.tensor_core import matrices

EXTRAS: frozenset[str] = frozenset({"entropy", "sum_squares", "top_k", "batch_invariant", SEVERAL_TARGETS, "allow_tf32"})
# float32 on tensor cores is as accurate as elsewhere by construction, but nobody has measured that yet, nor how fast it is.
ON_REQUEST: frozenset[np.dtype] = frozenset({np.dtype(np.float32)})
_DTYPES = (np.dtype(np.float16), BFLOAT16, *ON_REQUEST)
_LARGEST = 2**31 - 2**10
MOST_BEST = 64  # entries of a token: `tensor_core.top_k` has room for so many


def _tiles(dtype: np.dtype) -> AmpereTiles:
    """Those for CuPy's current device."""
    return tiles_for(gpu.current().compute_capability, elements_of(dtype).wide)


def why_not(p: Outline | Problem) -> str | None:
    """It takes CuPy arrays, but not of float64, on a GPU of compute capability 8.0 or later."""
    if gpu.SIMULATED:
        return "Numba's simulator knows no tensor cores"
    if (reason := gpu.why_not(p.on_device)) is not None:
        return reason
    if p.dtype not in _DTYPES:
        return f"its tensor cores take float16, bfloat16 and float32, and the arrays are {p.dtype}"
    major, minor = gpu.current().compute_capability
    if major < 8:
        return f"it needs compute capability 8.0 or later (Ampere: A100, RTX 30), and {p.device} has {major}.{minor}"
    if max(p.N, p.V, p.dtype.itemsize * p.D) > _LARGEST:
        return (
            "it counts tokens, entries and bytes of a row with 32 bits: "
            f"N, V and {p.dtype.itemsize} * D must be at most {_LARGEST:,}"
        )
    if p.options.top_k > MOST_BEST:
        return f"it finds up to {MOST_BEST} best entries, and top_k is {p.options.top_k}"
    return None


def statistics_form(p: Outline | Problem) -> StatisticsForm:
    """See `backend.Backend`. A row has the bits of whole tiles of the vocabulary."""
    return _form(_tiles(p.dtype), 1 if coarse_eps_of(p.options) is None else 2)


@functools.cache
def _form(tiles: AmpereTiles, planes: int) -> StatisticsForm:
    return StatisticsForm(np.dtype(np.int32), tiles.survivor_block, planes, row_unit_bytes=tiles.block_v // 8)


@dataclass(frozen=True, eq=False)
class AmperePlan(Plan):
    """layout: how the forward cuts the problem (`tensor_core.layout.Layout`)."""

    layout: Any = None


_plans: dict[Any, AmperePlan] = {}  # made so far: training asks for the same one again and again


def plan(p: Problem) -> AmperePlan:
    """Tiles and bytes."""
    layout = _module("tensor_core.layout").Layout.of(p, _tiles(p.dtype))
    key = layout, p.dtype, p.device, p.options, p.bias is not None, p.targets is not None, p.K
    if (known := _plans.get(key)) is not None:
        return known
    if len(_plans) >= 256:
        _plans.clear()
    return _plans.setdefault(key, _make_plan(p, layout))


def _make_plan(p: Problem, layout: Any) -> AmperePlan:
    folds, filters, K = _module("tensor_core.folds"), p.options.filters, p.K or 0
    chosen = _module("tensor_core.found").folds_of(p, filters)
    # The tokens' list, the folds' results and, where survivors are recorded, the bound that they begin with: 4 bytes each.
    of_tokens_bytes = 4 * (1 + len(folds.result_names(chosen)) + filters + K + 3 * p.options.top_k) * p.N
    how = f"forward and backward on the tensor cores of {p.device}, with instructions that all GPUs since 2020 have"
    if elements_of(p.dtype).wide:
        how += ", rounded to tf32" if p.options.allow_tf32 else ", each float32 number as the sum of two tf32 numbers"
    if layout.e_copied:
        how += f"; e is copied, since {layout.e_copied}"
    if layout.c_copied:
        how += f"; c is copied, {layout.c_rows} rows at a time, since {layout.c_copied}"
    by_rows = [f"{name}, since {why}" for name, x in (("e", p.e), ("c", p.c)) if (why := matrices.why_not_by_rows(x))]
    if by_rows:
        how += f"; for the backward whole copies: {' and '.join(by_rows)}"
    how += f"; {2 * p.N * p.V * p.D / 1e12:.3g} TFLOP of products in the forward, in the backward three times as many, "
    how += "less what the filter leaves out"
    coarse_eps = coarse_eps_of(p.options)
    if coarse_eps is not None:
        how += "; the gradients of c and of the bias leave out 128 sorted entries for 128 tokens at once where all are below "
        how += f"{coarse_eps:.3g}"
    return AmperePlan(
        backend="ampere",
        how=how,
        tiles=layout.tiles,
        layout=layout,
        stored_logits_bytes=p.logits_bytes,
        forward_bytes=layout.scratch_bytes(folds.number_count(chosen))
        + layout.copy_bytes
        + layout.best_bytes
        + of_tokens_bytes,
        survivor_bytes=statistics_form(p).survivor_bytes(p.N, p.V) if filters else 0,
        backward_bytes=_module("ampere.backward.workspace").workspace_bytes(p)
        + _module("tensor_core.backward.passes").bytes_beside(p),
        coarse_eps=coarse_eps,
    )


def indexed_dot(p: Problem, plan: Any) -> Any:
    """See `backend.Backend`."""
    return _module("ampere.forward.host").indexed_dot(p, plan.layout)


def forward(p: Problem, plan: Any, *, record_survivors: bool, keep_logits: bool = False) -> Statistics:
    """See `backend.Backend`."""
    launch = functools.partial(_module("ampere.forward.host").forward, layout=plan.layout, record=record_survivors)
    return _module("tensor_core.programs").forward(p, plan, record_survivors, 0, launch)


def reduced_nll(p: Problem, statistics: Statistics) -> Any:
    """See `backend.Backend`."""
    return _module("tensor_core.reduction").reduced_nll(p, statistics)


def nll_weight(p: Problem, statistics: Statistics, d_loss: Any) -> Any:
    """See `backend.Backend`."""
    return _module("tensor_core.reduction").nll_weight(p, statistics, d_loss)


def backward(p: Problem, plan: Plan, statistics: Statistics, weights: Weights, into: Gradients, adds: bool) -> None:
    """See `backend.Backend`."""
    adds = terms.write_outer(p, weights.outer, into, adds)
    launch = _module("ampere.backward.host").backward
    _module("tensor_core.programs").backward(p, plan, statistics, weights, into, adds, launch)


@functools.cache
def _module(name: str) -> Any:
    """A module of cce_numba, imported when it is needed: not in the simulator, whose `jit` takes none of what these ask."""
    return importlib.import_module(f"cce_numba.{name}")
