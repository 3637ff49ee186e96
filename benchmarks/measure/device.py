"""The GPU, through CuPy. CuPy is imported when something here is called, so that every program imports without it."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import cce_numba as cce
from benchmarks.data import Inputs
from benchmarks.errors import CannotRun
from cce_numba import gpu
from cce_numba.commands import machine

Call = Callable[[], Any]


def cupy() -> Any:
    """The module."""
    return importlib.import_module("cupy")


def why_none() -> str | None:
    """Why nothing can run on a GPU here, or None if it can."""
    return machine.why_no_gpu()


def require() -> None:
    """Raises CannotRun where there is no GPU."""
    if reason := why_none():
        raise CannotRun(reason)


def require_hopper(inputs: Inputs) -> None:
    """Raises CannotRun if another backend would run."""
    plan = cce.explain(*inputs)
    if plan.backend != "hopper":
        raise CannotRun(f"{plan.backend!r} would run, not 'hopper': {plan.rejected['hopper']}")


def multiprocessors() -> int:
    """Of the current device."""
    return gpu.current().multiprocessors


def mark() -> Any:
    """An event at the end of what is queued."""
    event = cupy().cuda.Event()
    event.record()
    return event


def elapsed_ms(start: Any, stop: Any) -> float:
    """Milliseconds between two events that have happened."""
    return cupy().cuda.get_elapsed_time(start, stop)


def wait() -> None:
    """Waits until the device has done all that is queued."""
    cupy().cuda.Device().synchronize()


def free_memory() -> None:
    """Gives back to the driver what CuPy's pool keeps for later."""
    cupy().get_default_memory_pool().free_all_blocks()


def captured(call: Call) -> Call:
    """A replay of the call from a CUDA graph, which takes the device's time and next to none of the host's."""
    stream = cupy().cuda.Stream(non_blocking=True)
    wait()
    with stream:
        call()  # so that the pool has memory for this stream, and nothing is left to compile
        stream.synchronize()
        stream.begin_capture()
        try:
            results = call()
        finally:
            graph = stream.end_capture()

    def replay() -> Any:
        graph.launch()
        return stream, results  # which must live as long as the graph writes to them

    return replay


@functools.cache
def torch_with_cuda() -> Any:
    """PyTorch, or None where it is not installed or has no GPU."""
    try:
        import torch
    except ImportError:
        return None
    return torch if torch.cuda.is_available() else None


def as_torch(array: Any) -> Any:
    """A tensor on the memory of a CuPy array of integers or bfloat16."""
    torch = torch_with_cuda()
    if array.dtype.kind == "i":
        return torch.from_dlpack(array)
    return torch.from_dlpack(array.view("int16")).view(torch.bfloat16)
