"""The most memory that a call takes at once, as CuPy's pool or PyTorch's allocator hands it out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

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
