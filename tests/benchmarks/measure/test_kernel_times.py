"""Kernels by name."""

from __future__ import annotations

from benchmarks.measure import kernel_times


def test_kernels_are_summed_by_name():
    mangled = "_ZN9cce_numba6hopper13make_a_kernel12_3clocals_3e8a_kernelB2v1B4cw51E10float32_2ai"
    name = "cce_numba.hopper.make_a_kernel.a_kernel"
    kernels = kernel_times.summed((kernel_times.readable(x), us) for x, us in [("copy", 1.0), (mangled, 2.0), (mangled, 3.0)])
    assert kernels == [{"name": name, "calls": 2, "us": 5.0}, {"name": "copy", "calls": 1, "us": 1.0}]


def test_without_pytorch_on_a_gpu_there_is_nothing_to_tell(monkeypatch):
    monkeypatch.setattr(kernel_times.device, "torch_with_cuda", lambda: None)
    assert "no PyTorch with CUDA" in kernel_times.of(lambda: None)
