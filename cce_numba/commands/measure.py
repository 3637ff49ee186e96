"""Time, memory and progress of a call."""

from __future__ import annotations

import contextlib
import importlib
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from cce_numba.progress import reported_to


@dataclass
class Seconds:
    """Wall-clock time; known when `stopwatch` is left."""

    value: float = 0.0


@dataclass
class PeakBytes:
    """The most memory that was in use at once beyond what was before; known when `peak_memory` is left."""

    value: int = 0


@contextlib.contextmanager
def stopwatch(on_device: bool) -> Iterator[Seconds]:
    """Measures what is done inside, on a GPU until it is done there."""
    seconds = Seconds()
    _wait_for_device(on_device)
    start = time.perf_counter()
    yield seconds
    _wait_for_device(on_device)
    seconds.value = time.perf_counter() - start


@contextlib.contextmanager
def peak_memory(on_device: bool) -> Iterator[PeakBytes]:
    """Measures the memory taken inside: on the host, what Python and NumPy allocate; on a GPU, what CuPy's pool hands out."""
    peak = PeakBytes()
    with _device_peak(peak) if on_device else _host_peak(peak):
        yield peak


@contextlib.contextmanager
def progress(console: Console, phase: str) -> Iterator[None]:
    """Shows how far what is done inside has come, if the console is a terminal; nothing of it stays there."""
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task(phase, total=None)  # without blocks to count, as on a GPU, it only shows that work goes on

        def report(what: str, done: int, total: int) -> None:
            bars.update(task, description=f"{phase}: {what}", completed=done, total=total)

        with reported_to(report):
            yield


def _wait_for_device(on_device: bool) -> None:
    if on_device:
        importlib.import_module("cupy").cuda.get_current_stream().synchronize()


@contextlib.contextmanager
def _host_peak(peak: PeakBytes) -> Iterator[None]:
    was_tracing = tracemalloc.is_tracing()
    if not was_tracing:
        tracemalloc.start()
    tracemalloc.reset_peak()
    before, _ = tracemalloc.get_traced_memory()
    try:
        yield
        peak.value = tracemalloc.get_traced_memory()[1] - before
    finally:
        if not was_tracing:
            tracemalloc.stop()


@contextlib.contextmanager
def _device_peak(peak: PeakBytes) -> Iterator[None]:
    cupy = importlib.import_module("cupy")

    class Hook(cupy.cuda.MemoryHook):  # type: ignore[name-defined]  # CuPy is imported only here
        name = "cce_numba"
        in_use = 0

        def malloc_postprocess(self, device_id: int, size: int, mem_size: int, mem_ptr: int, pmem_id: int) -> None:
            self.in_use += mem_size
            peak.value = max(peak.value, self.in_use)

        def free_postprocess(self, device_id: int, mem_size: int, mem_ptr: int, pmem_id: int) -> None:
            self.in_use -= mem_size

    with Hook():
        yield


def to_host(array: Any) -> Any:
    """A NumPy or CuPy array as NumPy."""
    return array.get() if hasattr(array, "get") else array
