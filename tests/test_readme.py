"""The README's example runs as it stands there, and with CuPy where there is a GPU; its options are the options."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cce_numba.options import DEFAULTS
from tests.helpers.harness import SimulatorHarness

README = (Path(__file__).parent.parent / "README.md").read_text()
EXAMPLE, *_ = re.findall(r"```python\n(.*?)```", README, re.DOTALL)  # others are run by tests/transformers and tests/torch

pytestmark = pytest.mark.skipif(SimulatorHarness.is_active(), reason="its sizes are not for the simulator")


def run(source: str) -> dict:
    names: dict = {}
    exec(compile(source, "README.md", "exec"), names)
    return names


def test_example(capsys):
    names = run(EXAMPLE)
    assert names["loss"].shape == ()
    assert names["grads"].e.shape == (512, 256)
    assert names["grads"].c.shape == (8000, 256)
    assert float(abs(names["grads"].c).max()) > 1e-4
    assert "backend cpu" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_example_with_cupy(capsys):
    example = EXAMPLE.replace("import numpy as np", "import cupy as np")
    assert example != EXAMPLE
    names = run(example)
    assert type(names["grads"].c).__module__.partition(".")[0] == "cupy"
    assert "backend simt" in capsys.readouterr().out


def test_every_option_is_told_with_its_default():
    for name, default in DEFAULTS.items():
        (row,) = [line for line in README.splitlines() if line.startswith("|") and f"`{name}`" in line.split("|")[1]]
        assert f"`{default!r}`".replace("'", '"') in row.split("|")[2] or f"`{default}`" in row.split("|")[2], row
