"""Patched models in two processes: copies of them, in shards, and with a head whose rows are on several ranks."""

from __future__ import annotations

import functools

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")
if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("this PyTorch has no gloo", allow_module_level=True)

from tests.torch import processes  # noqa: E402
from tests.transformers.parallel_steps import CASES  # noqa: E402


@functools.cache
def outcomes():
    """What each case came to: all run in the same processes, since to start takes them longest."""
    return processes.outcomes("tests.transformers.parallel_steps", 2)


@pytest.mark.parametrize("name", CASES)
def test_trains_as_one_process(name):
    if name.startswith("trainer"):
        pytest.importorskip("accelerate", reason="accelerate is not installed")
    assert outcomes()[name] == processes.FINE
