"""What this machine has: asked of CuPy and Numba, which are imported only here and only when asked."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
from dataclasses import dataclass

GET_CUPY = "pip install 'cce_numba[cuda13]' (or cuda12, to match the driver)"


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU: compute capability like "9.0", memory in bytes."""

    index: int
    name: str
    compute_capability: str
    memory_bytes: int


def simulated() -> bool:
    """Whether Numba's CUDA simulator stands in for a GPU."""
    return bool(importlib.import_module("numba").config.ENABLE_CUDASIM)


def why_no_gpu() -> str | None:
    """Why no problem can be put on a GPU here, with what would help; None if one can."""
    if simulated():
        return "NUMBA_ENABLE_CUDASIM=1 runs the kernels in Numba's simulator, on arrays of the host"
    if importlib.util.find_spec("cupy") is None:
        return f"CuPy, which GPU arrays need, is not installed: {GET_CUPY}"
    try:
        cupy = importlib.import_module("cupy")
    except ImportError as error:
        return f"CuPy does not import: {_one_line(error)}"
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"no NVIDIA GPU with a driver that is new enough for CuPy ({_one_line(error)}); nvidia-smi tells which is there"
    if count == 0:
        return "CUDA finds no NVIDIA GPU"
    cuda = importlib.import_module("numba.cuda")
    if not cuda.is_available():
        return f"Numba cannot use the GPU: {_one_line(cuda.cuda_error() or 'its CUDA compiler libraries are missing')}"
    return None


def gpus() -> list[Gpu]:
    """The GPUs that CUDA shows to this process; call only where `why_no_gpu` is None."""
    runtime = importlib.import_module("cupy").cuda.runtime
    found = []
    for index in range(runtime.getDeviceCount()):
        properties = runtime.getDeviceProperties(index)
        found.append(
            Gpu(
                index=index,
                name=properties["name"].decode(),
                compute_capability=f"{properties['major']}.{properties['minor']}",
                memory_bytes=int(properties["totalGlobalMem"]),
            )
        )
    return found


def driver_version() -> str | None:
    """The newest CUDA version that the driver knows, like "13.0"; None without a driver, and in the simulator."""
    with contextlib.suppress(Exception):  # whatever stands in the way, there is no driver to tell of
        major, minor = importlib.import_module("numba.cuda.cudadrv.driver").get_version()
        return f"{major}.{minor}"
    return None


def cpu_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _one_line(error: object) -> str:
    return " ".join(str(error).split())
