"""`python -m cce_numba info`: versions, devices, which backend would run, and what is missing."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
from dataclasses import asdict
from typing import Any

import numpy as np

from cce_numba import arguments, disk
from cce_numba import plan as planning
from cce_numba.backend import backend_module
from cce_numba.commands import Exit, machine, show
from cce_numba.interchange import BFLOAT16
from cce_numba.launch import cubin_cache

# By what they are called, the names that they are distributed under, and what installs them.
_PACKAGES = {
    "numpy": (("numpy",), "pip install numpy"),
    "numba": (("numba",), "pip install numba"),
    "numba-cuda": (("numba-cuda",), "pip install numba-cuda"),
    "ml_dtypes": (("ml_dtypes",), "pip install ml_dtypes"),
    "cupy": (("cupy-cuda13x", "cupy-cuda12x", "cupy"), machine.GET_CUPY),
    "torch": (("torch",), "pip install 'cce_numba[torch]'"),
    "jax": (("jax",), "pip install 'cce_numba[jax]'"),
    "rich": (("rich",), "pip install 'cce_numba[cli]'"),
}


def run(as_json: bool) -> int:
    """Prints what there is; finding little is no failure."""
    found = _gather()
    show.as_json(found) if as_json else _show(found)
    return Exit.FINE


def _gather() -> dict[str, Any]:
    no_gpu = machine.why_no_gpu()
    return {
        "versions": {
            "python": platform.python_version(),
            "cce_numba": importlib.import_module("cce_numba").__version__,
            **{name: _version(names) for name, (names, _) in _PACKAGES.items()},
        },
        "cpu_cores": machine.cpu_cores(),
        "simulator": machine.simulated(),
        "driver_cuda": machine.driver_version(),
        "devices": [] if no_gpu else [asdict(gpu) for gpu in machine.gpus()],
        "no_device": no_gpu,
        "backends": {
            "NumPy float32": _choices(np, np.dtype(np.float32)),
            "CuPy bfloat16": {"runs": None, "how": None, "not": {}}
            if no_gpu
            else _choices(importlib.import_module("cupy"), BFLOAT16),
        },
        "cache": _cache(),
    }


def _version(names: tuple[str, ...]) -> str | None:
    """Of the first of the distributions that is installed; nothing is imported."""
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _choices(xp: Any, dtype: np.dtype) -> dict[str, Any]:
    """Which backend would run for arrays of this kind, and why each of the others would not."""
    e, c, targets = np.zeros((8, 8), dtype), np.zeros((16, 8), dtype), np.zeros(8, np.int64)
    problem = arguments.problem(xp.asarray(e), xp.asarray(c), xp.asarray(targets), {})
    modules = {name: backend_module(name) for name in planning.BACKENDS}
    reasons = {name: each.why_not(problem) or planning.why_on_request(problem, each) for name, each in modules.items()}
    runs = next((name for name in planning.BACKENDS if reasons[name] is None), None)
    how = None if runs is None else planning.choose(problem, runs).how
    others = {name: reason or f"{runs} is preferred" for name, reason in reasons.items() if name != runs}
    return {"runs": runs, "how": how, "not": others}


def _cache() -> dict[str, Any]:
    """Compiled kernels on disk: those that this version of the package loads, by subpackage, and all others."""
    entries, place = cubin_cache.entries(), disk.directory()
    kernels: dict[str, dict[str, Any]] = {}
    for entry in entries:
        if entry.is_current:
            group = kernels.setdefault(entry.package, {"number": 0, "bytes": 0, "compute_capabilities": []})
            group["number"] += 1
            group["bytes"] += entry.nbytes
            group["compute_capabilities"] = sorted({*group["compute_capabilities"], entry.compute_capability})
    others = [entry.nbytes for entry in entries if not entry.is_current]
    return {
        "directory": None if place is None else str(place),
        "why_unusable": cubin_cache.why_unusable(),
        "bytes": sum(entry.nbytes for entry in entries),
        "most_bytes": cubin_cache.MAX_BYTES,
        "kernels": kernels,
        "of_other_sources": {"number": len(others), "bytes": sum(others)},
    }


def _show(found: dict[str, Any]) -> None:
    out = show.console()
    rows = [(name, found["versions"][name] or _missing(name)) for name in found["versions"]]
    out.print(show.facts("Versions", rows))

    rows = [("CPU", f"{found['cpu_cores']} cores")]
    rows += [(f"GPU {gpu['index']}", _gpu(gpu)) for gpu in found["devices"]]
    if found["no_device"]:
        rows.append(("GPU", f"none: {found['no_device']}"))
    if not found["simulator"]:
        driver = f"knows CUDA up to {found['driver_cuda']}" if found["driver_cuda"] else "none found for NVIDIA GPUs"
        rows.append(("driver", driver))
    off = "off (NUMBA_ENABLE_CUDASIM=1 runs the simt backend without a GPU, slowly)"
    rows.append(("simulator", "on" if found["simulator"] else off))
    out.print(show.facts("Devices", rows))

    rows = []
    for kind, choice in found["backends"].items():
        rows.append((kind, f"{choice['runs']}: {choice['how']}" if choice["runs"] else f"none: {found['no_device']}"))
        rows += [(f"  not {name}", reason) for name, reason in choice["not"].items()]
    out.print(show.facts("Which backend would run, by arrays", rows))
    out.print(show.facts("Compiled kernels on disk", _cache_rows(found["cache"])))


def _cache_rows(cache: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [("directory", cache["directory"] or "none")]
    if cache["why_unusable"]:
        rows.append(("usable", f"no: {cache['why_unusable']}"))
    rows.append(("size", f"{show.size(cache['bytes'])} of at most {show.size(cache['most_bytes'])}; the oldest go first"))
    for package, group in cache["kernels"].items():
        capabilities = f"compute capability {', '.join(group['compute_capabilities'])}"
        rows.append((f"  {package}", f"{group['number']} kernels, {show.size(group['bytes'])}, {capabilities}"))
    if (others := cache["of_other_sources"])["number"]:
        rows.append(("  others", f"{others['number']} kernels, {show.size(others['bytes'])}, of other versions of the package"))
    if not cache["bytes"]:
        rows.append(("  empty", "python -m cce_numba precompile fills it, and so does the first call on a GPU"))
    return rows


def _missing(name: str) -> str:
    return f"not installed; {_PACKAGES[name][1]}"


def _gpu(gpu: dict[str, Any]) -> str:
    memory = f"{gpu['memory_bytes'] / 2**30:,.1f} GiB"
    return f"{gpu['name']}, compute capability {gpu['compute_capability']}, {memory}"
