"""Where the tests of the PyTorch adapter run, on the CPU anywhere, on CUDA where there is one; and how autograd records."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from tests.conftest import skip_or_fail_without_gpu


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Any:
    """A `torch.device`."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    if request.param == "cuda":
        skip_or_fail_without_gpu()
        if not torch.cuda.is_available():
            reason = "this PyTorch has no CUDA"
            (pytest.fail if os.environ.get("CCE_REQUIRE_GPU") == "1" else pytest.skip)(reason)
    return torch.device(request.param)


@pytest.fixture(scope="session")
def cuda() -> Any:
    """For what is about CUDA alone."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    skip_or_fail_without_gpu()
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    return torch.device("cuda")


@pytest.fixture(scope="module", params=["function", "operator"])
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """How autograd records a call. Whole modules use it, so that both ways are held to the same."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "operator":
            patch.setattr("cce_numba.torch.autograd.is_watched", lambda tensors: True)
        yield request.param
