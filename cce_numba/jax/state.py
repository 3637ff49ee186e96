"""What a backward needs of a forward (`backend.Statistics`), in one array of bytes whose size follows from the arguments.

JAX must know the shapes of all arrays when it traces a program, and may not yet know the device then. So there is room for the
survivor bits of whichever backend needs the most; the others leave some of it unused.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Collection, Iterator
from typing import Any

import jax
import numpy as np

from cce_numba.arguments import Problem
from cce_numba.backend import BACKENDS, Statistics, StatisticsForm, backend_module
from cce_numba.integers import ceil_div

_ALIGNMENT_BYTES = 256
_PER_TOKEN = ("lse", "max_logit", "log_sum")


def n_bytes(p: Problem, wrt: Collection[str]) -> int:
    """The size of the array. `p` may have stand-ins for arrays, of the right shapes; `wrt`: the gradients to come."""
    *_, (_, _, _, end) = _fields(p, wrt)
    return end


def write(state: Any, p: Problem, form: StatisticsForm, statistics: Statistics, wrt: Collection[str]) -> None:
    """Copies what a forward left to the array."""
    places = _views(state, p, wrt)
    for name in (*_PER_TOKEN, "target_logit", "n_valid", "mean_logit", "entropy", "draw_seed"):
        if name in places and (array := getattr(statistics, name)) is not None:
            places[name][...] = array
    tokens = statistics.tokens[: p.N]  # those that count, and on a device more
    places["tokens"].view(form.tokens)[: len(tokens)] = tokens
    if "survivors" not in places:
        return
    bits = statistics.survivors
    if p.on_device:  # all of its memory: there may be more beside the rows, see `StatisticsForm`
        size = form.survivor_bytes(p.N, p.V)
        places["survivors"][:size] = p.xp.ndarray((size,), bits.dtype, bits.data)
    else:
        places["are_recorded"][...] = bits is not None
        if bits is not None:
            places["survivors"][: bits.size] = bits.reshape(-1)


def read(state: Any, p: Problem, form: StatisticsForm, wrt: Collection[str]) -> Statistics:
    """What `write` was given, in the memory of the array."""
    places = _views(state, p, wrt)
    tokens = places["tokens"].view(form.tokens)[: p.N]
    bits, recorded = None, "survivors" in places
    if not p.on_device:
        tokens = tokens[: int(places["n_valid"])]
        recorded = recorded and bool(places["are_recorded"])
    if recorded:
        rows = form.survivors_shape(p.N, p.V)
        bits = places["survivors"][: form.survivor_bytes(p.N, p.V)].reshape(rows)[:, : ceil_div(p.V, 8)]
    return Statistics(
        **{name: places[name] for name in (*_PER_TOKEN, "target_logit", "n_valid")},
        tokens=tokens,
        survivors=bits,
        survivor_block=form.survivor_block,
        mean_logit=places.get("mean_logit"),
        entropy=places.get("entropy"),
        draw_seed=places["draw_seed"] if recorded and p.options.is_unbiased else None,
    )


def _views(state: Any, p: Problem, wrt: Collection[str]) -> dict[str, Any]:
    return {name: state[start:end].view(dtype).reshape(shape) for name, (dtype, shape), start, end in _fields(p, wrt)}


def _fields(p: Problem, wrt: Collection[str]) -> Iterator[tuple[str, tuple[np.dtype, tuple[int, ...]], int, int]]:
    """The arrays, each with its dtype and shape, and the first byte and the one after the last."""
    wide, integer, byte = p.compute_dtype, np.dtype(np.int64), np.dtype(np.uint8)
    forms = {
        **dict.fromkeys(_PER_TOKEN, (wide, (p.N,))),
        "target_logit": (wide, tuple(p.targets.shape)),
        "n_valid": (integer, ()),
        "tokens": (integer, (p.N,)),  # room for any backend's integers
    }
    if p.options.smooths_capped:
        forms["mean_logit"] = (wide, (p.N,))
    if p.options.entropy:
        forms["entropy"] = (wide, (p.N,))
    if p.options.records_survivors(wrt):
        forms |= {"draw_seed": (integer, ()), "are_recorded": (byte, ()), "survivors": (byte, (_survivor_bytes(p),))}
    start = 0
    for name, (dtype, shape) in forms.items():
        end = start + math.prod(shape) * dtype.itemsize
        yield name, (dtype, shape), start, end
        start = ceil_div(end, _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def _survivor_bytes(p: Problem) -> int:
    """Memory of the survivor bits of the backend that needs the most, of those that may run here."""
    names = BACKENDS if _may_run_on_a_gpu() else ("cpu",)
    return max(backend_module(name).statistics_form(p).survivor_bytes(p.N, p.V) for name in names)


@functools.cache
def _may_run_on_a_gpu() -> bool:
    """Whether JAX has one, and CuPy is there, which kernels need. Backends for GPUs may have to ask one for their forms."""
    try:
        return bool(jax.devices("cuda")) and importlib.util.find_spec("cupy") is not None
    except RuntimeError:
        return False
