"""`python -m cce_numba precompile`: compiles kernels into the cache on disk, on a machine that need not have a GPU."""

from __future__ import annotations

import argparse
import importlib
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console

import cce_numba as cce
from cce_numba import disk
from cce_numba.backend import BackendUnavailable
from cce_numba.commands import DTYPES, Exit, UsageError, machine, show
from cce_numba.commands.measure import progress
from cce_numba.commands.options import OPTIONS, SEVERAL
from cce_numba.interchange import BFLOAT16
from cce_numba.launch import cubin_cache
from cce_numba.launch.absent import absent_gpu
from cce_numba.launch.kernel import Kernel
from cce_numba.launch.offline import precompile
from cce_numba.options import DEFAULTS
from cce_numba.progress import advance

# Sizes at which a backend may choose other kernels. N and V are neither too small for all kernels to be launched nor multiples
# of a tile. D has rows that are whole 16 bytes, or not, and an odd or an even number of tiles.
SHAPES = ((300, 1000, 128), (300, 1000, 256), (300, 1000, 100), (300, 1000, 41))


@dataclass(frozen=True)
class Wanted:
    """A kernel to compile: for which backend and dtype it was found, and for which compute capability."""

    backend: str
    dtype: str
    cc: tuple[int, int]
    kernel: Kernel


def run(arguments: argparse.Namespace) -> int:
    """Compiles what is asked for, and tells what is in the cache now."""
    if machine.simulated():
        raise UsageError("precompile: NUMBA_ENABLE_CUDASIM=1 runs kernels in Numba's simulator, which compiles nothing")
    if (reason := cubin_cache.why_unusable()) is not None:
        raise UsageError(f"precompile: no kernels are kept, since {reason}")
    console = Console(stderr=True)
    with progress(console, "finding the kernels"):
        wanted = _wanted(arguments)
    made = []
    with progress(console, "compiling"):
        for done, item in enumerate(wanted):
            advance(f"{item.kernel.function.__name__} ({item.backend}, {item.dtype}, {_dotted(item.cc)})", done, len(wanted))
            path = item.kernel.path(item.cc)
            was_there = path is not None and path.exists()
            try:
                made.append((item, was_there, precompile(item.kernel, item.cc).stat().st_size))
            except OSError as error:
                raise UsageError(f"precompile: {disk.directory()} cannot be written: {error}") from error
    found = _summary(made)
    show.as_json(found) if arguments.json else _show(found)
    return Exit.FINE


def kernels_of(backend: str | None, dtype: str, options: Iterable[str], cc: tuple[int, int]) -> tuple[str, list[Kernel]]:
    """The backend that runs, and the kernels that it launches for loss and gradients of any size.

    The calls themselves are made, on a GPU that is not there, and their launches noted. Options are names of `OPTIONS`, that a
    call has all at once. Arrays are contiguous. Raises BackendUnavailable if the backend, or every backend, cannot run.
    """
    names, numpy_dtype = list(options), BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype)
    found: dict[Kernel, None] = {}
    with absent_gpu(cc) as (cupy, launched):
        for shape in SHAPES:
            N, V, D = shape
            arrays = cupy.zeros((N, D), numpy_dtype), cupy.zeros((V, D), numpy_dtype), cupy.zeros(N, np.int64)
            given: dict[str, Any] = {"backend": backend}
            for name in names:
                given |= OPTIONS[name](shape, cupy, numpy_dtype)
            if "target_probs" in given:
                arrays = *arrays[:2], cupy.zeros((N, SEVERAL), np.int64)
            runs = cce.explain(*arrays, **given).backend
            cce.linear_cross_entropy(*arrays, **given)
            exact: list[dict[str, Any]] = [{}]
            if given.get("filter", DEFAULTS["filter"]) == "unbiased":  # exact gradients take the other kernels
                exact += [{"filter_c_grad": False}, {"filter_e_grad": False, "filter_c_grad": False}]
            for wrt, flags in itertools.product((None, "e", "c"), exact):
                cce.linear_cross_entropy_with_grad(*arrays, wrt=wrt, **given | flags)
                if given.get("entropy"):  # what flows back into it takes other kernels
                    cce.backward(cce.forward(*arrays, **given | flags), d_entropy=1.0, wrt=wrt)
        found |= dict.fromkeys(launched)
    return runs, list(found)


def _wanted(arguments: argparse.Namespace) -> list[Wanted]:
    """Each kernel once, of all backends, dtypes and compute capabilities that are asked for and go together."""
    wanted: dict[Any, Wanted] = {}
    reasons = []
    for cc in arguments.cc:
        for backend in arguments.backend or [None]:
            for dtype in arguments.dtype or DTYPES:
                try:
                    runs, kernels = kernels_of(backend, dtype, arguments.options, cc)
                except BackendUnavailable as reason:
                    if backend is not None and arguments.dtype:
                        raise  # they were asked for together
                    reasons.append(reason)
                    continue
                for kernel in kernels:
                    wanted.setdefault(kernel.path(cc), Wanted(runs, dtype, cc, kernel))
    if not wanted:
        raise reasons[0]
    for cc in arguments.cc:
        if cc not in (supported := importlib.import_module("numba.cuda.cudadrv.nvrtc").get_supported_ccs()):
            known = ", ".join(map(_dotted, supported))
            raise UsageError(f"--cc: this compiler knows {known}, got {_dotted(cc)}")
    return list(wanted.values())


def _summary(made: list[tuple[Wanted, bool, int]]) -> dict[str, Any]:
    groups: dict[tuple[str, str, tuple[int, int]], dict[str, Any]] = {}
    for item, was_there, nbytes in made:
        new = {"backend": item.backend, "dtype": item.dtype, "compute_capability": _dotted(item.cc)}
        group = groups.setdefault((item.backend, item.dtype, item.cc), new | {"compiled": 0, "there_before": 0, "bytes": 0})
        group["there_before" if was_there else "compiled"] += 1
        group["bytes"] += nbytes
    return {"directory": str(disk.directory()), "kernels": list(groups.values())}


def _show(found: dict[str, Any]) -> None:
    rows = [("directory", found["directory"])]
    for group in found["kernels"]:
        what = f"{group['backend']}, {group['dtype']}, {group['compute_capability']}"
        rows.append((what, f"{group['compiled']} compiled, {group['there_before']} there before, {show.size(group['bytes'])}"))
    total = sum(group["bytes"] for group in found["kernels"])
    rows.append(("together", f"{sum(g['compiled'] + g['there_before'] for g in found['kernels'])} kernels, {show.size(total)}"))
    out = show.console()
    out.print(show.facts("Compiled kernels; those that dtypes share are counted once", rows))


def _dotted(cc: tuple[int, int]) -> str:
    return f"{cc[0]}.{cc[1]}"
