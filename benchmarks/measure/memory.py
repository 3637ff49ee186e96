"""The most memory that a call takes at once, as CuPy's pool or PyTorch's allocator hands it out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure.device import Call
from cce_numba.commands import measure


def peak_bytes(call: Call) -> int:
    """The most device memory that a call takes from CuPy's pool at once, its results included."""
    with measure.peak_memory(on_device=True) as peak:
        call()
    return peak.value


@dataclass
class TorchPeak:
    """The most memory that PyTorch handed out at once; known when `torch_peak` is left."""

    bytes: int = 0


@contextlib.contextmanager
def torch_peak() -> Iterator[TorchPeak]:
    """Measures what PyTorch hands out inside, beyond what it had handed out before."""
    import torch

    peak, before = TorchPeak(), torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    yield peak
    peak.bytes = torch.cuda.max_memory_allocated() - before


@dataclass
class Peak:
    """The most memory that was taken at once; None where it cannot be told."""

    bytes: int | None = None


@contextlib.contextmanager
def peak_of(device: str) -> Iterator[Peak]:
    """Measures the most memory taken inside beyond what was taken before.

    Of "cuda" it is what PyTorch hands out, to our kernels too. Of "cpu" it is how far the resident set of the whole process
    grows, as Linux counts it: a coarse figure, 0 where freed memory was taken again.
    """
    peak = Peak()
    if device == "cuda":
        with torch_peak() as of_torch:
            yield peak
        peak.bytes = of_torch.bytes
        return
    before = _resident_bytes(reset=True)
    yield peak
    after = _resident_bytes(reset=False)
    peak.bytes = None if before is None or after is None else max(0, after - before)


def _resident_bytes(reset: bool) -> int | None:
    """The highest resident set so far, of this moment on if `reset`."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    (line,) = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return 1024 * int(line.split()[1])
