"""Two and four processes that share a vocabulary, on the CPU: every function and option gives what one process does."""

from __future__ import annotations

import functools

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("cce_numba.torch")
if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("this PyTorch has no gloo", allow_module_level=True)

from tests.torch import processes  # noqa: E402
from tests.torch.vocab_parallel_steps import CASES  # noqa: E402

SAYS = {
    "mixed": "c: must be a plain tensor, got a DTensor; pass c.full_tensor | "
    "e: must be a plain tensor, got a DTensor, but c is none; pas | "
    "c: as a DTensor it must be Shard(0) along one dimension of i | "
    "c: as a DTensor it must be Shard(0) along one dimension of i"
}


@functools.cache
def outcomes(size):
    """What each case came to: all run in the same processes, since to start takes them longest."""
    return processes.outcomes("tests.torch.vocab_parallel_steps", size)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_as_one_process(name, size):
    assert outcomes(size)[name] == SAYS.get(name, processes.FINE)
