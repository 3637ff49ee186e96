"""Two processes on the CPU: what shards or copies parameters trains as one process does on both halves of the batch.

FSDP frees a parameter's memory after the forward and gathers it elsewhere for the backward.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("cce_numba.torch")
if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("this PyTorch has no gloo", allow_module_level=True)

ROOT = Path(__file__).parent.parent.parent
# What is wrapped: the body in units of its own; the head in the root's unit, where the loss is called in the root's forward,
# or in one of its own, whose forward is the loss; a head whose weight is that of the embedding.
WAYS = [
    *(f"ddp {more}" for more in ("plain", "static graph", "unused parameters", "tied")),
    *(f"fsdp1 {more}" for more in ("root", "original parameters", "own", "tied")),
    *(f"fsdp2 {more}" for more in ("root", "root kept", "own", "tied", "bfloat16")),
]


@pytest.fixture(scope="module")
def outcomes():
    """What each way came to, in the words of process 0: both run all of them, since to start takes them longest."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "tests.torch.distributed_steps", *WAYS]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(line.split(": ", 1) for line in done.stdout.splitlines())


@pytest.mark.parametrize("way", WAYS)
def test_trains_as_one_process(outcomes, way):
    assert outcomes[way] == "as one process"


def test_a_parameter_in_shards_is_refused(outcomes):
    """It is one outside of its unit's forward."""
    assert outcomes["outside"].startswith("TypeError c: must be a plain tensor, got a DTensor; pass c.full_tensor(), or, if ")
    assert outcomes["outside"].endswith("call the loss in the forward of the module that has it")
