"""Stand-ins for what a machine without a GPU lacks: a clock, CuPy, an archive of a real model."""

from __future__ import annotations

import time
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from rich.console import Console

from benchmarks.measure import cublas, device, host, record
from benchmarks.programs import backward, forward


class NumpyAsCupy:
    """NumPy, with the one thing more that is asked of CuPy."""

    def __getattr__(self, name):
        return getattr(np, name)

    def get_default_memory_pool(self):
        return SimpleNamespace(free_all_blocks=lambda: None)


@pytest.fixture
def archive_arrays():
    """What is stored of a last layer with 60 entries of size 8, and 30 tokens."""
    rng = np.random.default_rng(0)
    return {
        "classifier_q": rng.integers(-8, 8, (60, 2, 4), np.int8),
        "classifier_scale": rng.uniform(0.05, 0.1, (60, 2)).astype(np.float16),
        "embeddings_bf16": (rng.standard_normal((30, 8)) + 1).astype(ml_dtypes.bfloat16).view(np.uint16),
        "targets": rng.integers(0, 60, 30, np.int32),
        "loss_fp32": np.zeros(30, np.float32),
    }


@pytest.fixture
def archive(archive_arrays, tmp_path):
    """The path of such an archive."""
    np.savez(tmp_path / "layer.npz", **archive_arrays)
    return str(tmp_path / "layer.npz")


@pytest.fixture
def clock(monkeypatch):
    """What the device has done, in ms: a call adds what it takes."""
    clock = SimpleNamespace(ms=0.0)
    monkeypatch.setattr(device, "mark", lambda: clock.ms)
    monkeypatch.setattr(device, "elapsed_ms", lambda start, stop: stop - start)
    monkeypatch.setattr(device, "wait", lambda: None)
    return clock


@pytest.fixture
def without_gpu(monkeypatch, tmp_path):
    """Programs run on NumPy arrays and the CPU backend, on small problems. Graphs cannot be captured."""
    pytest.importorskip("cupy", reason="memory is measured by a hook of CuPy's")

    def no_graph(call):
        raise RuntimeError("no graphs [here]")

    monkeypatch.setattr(device, "why_none", lambda: None)
    monkeypatch.setattr(device, "cupy", NumpyAsCupy)
    monkeypatch.setattr(device, "require_hopper", lambda inputs: None)
    monkeypatch.setattr(device, "torch_with_cuda", lambda: None)
    monkeypatch.setattr(device, "mark", time.perf_counter)
    monkeypatch.setattr(device, "elapsed_ms", lambda start, stop: 1e3 * (stop - start))
    monkeypatch.setattr(device, "wait", lambda: None)
    monkeypatch.setattr(device, "captured", no_graph)
    monkeypatch.setattr(cublas, "product", lambda inputs: lambda: inputs.e.astype(np.float32) @ inputs.c.astype(np.float32).T)
    monkeypatch.setattr(host, "RUNS", 3)
    monkeypatch.setattr(forward, "SMALL_SHAPES", ((300, 1000, 32), (1100, 70, 8)))
    monkeypatch.setattr(backward, "SMALL_SHAPE", (300, 1000, 200))
    monkeypatch.setattr(record, "RESULTS", tmp_path)


@pytest.fixture
def shown():
    """A function that gives the text of a table as a wide console shows it."""

    def show(table):
        console = Console(width=180)
        with console.capture() as capture:
            console.print(table)
        return capture.get()

    return show
