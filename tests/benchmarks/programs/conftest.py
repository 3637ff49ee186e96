"""PyTorch on the CPU in place of PyTorch on a GPU."""

from __future__ import annotations

import contextlib
import importlib

import pytest

from benchmarks.measure import device, memory
from benchmarks.measure.memory import TorchPeak


@pytest.fixture
def torch_on_cpu(without_gpu, monkeypatch):
    """PyTorch, for which all memory is 1 MiB, and which traces code without generating any."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    peer, trainer = map(importlib.import_module, ("benchmarks.peers.stored_logits", "benchmarks.training.trainer"))

    @contextlib.contextmanager
    def torch_peak():
        yield TorchPeak(2**20)

    def compiled(function):
        return torch.compile(function, fullgraph=True, dynamic=False, backend="aot_eager")

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors are so small that threads only wait for each other
    torch._dynamo.reset()
    monkeypatch.setattr(device, "torch_with_cuda", lambda: torch)
    monkeypatch.setattr(memory, "torch_peak", torch_peak)
    monkeypatch.setattr(trainer, "torch_peak", torch_peak)
    monkeypatch.setattr(trainer, "DEVICE", "cpu")
    monkeypatch.setattr(peer, "compiled", compiled)
    yield torch
    torch._dynamo.reset()
    torch.set_num_threads(threads)
