"""What is told where there is no GPU, or another than the one that is needed."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.data import random
from benchmarks.errors import CannotRun
from benchmarks.measure import device


def test_refuses_without_a_gpu_and_for_another_backend(monkeypatch):
    monkeypatch.setattr(device.machine, "why_no_gpu", lambda: "there is none")
    with pytest.raises(CannotRun, match="there is none"):
        device.require()
    with pytest.raises(CannotRun, match="'cpu' would run, not 'hopper': "):
        device.require_hopper(random.make(8, 8, 8, np))
