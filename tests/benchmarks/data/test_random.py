"""Random inputs."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from benchmarks.data import random, rows


def test_random_inputs(monkeypatch):
    monkeypatch.setattr(rows, "ROWS", 100)
    inputs = random.make(300, 250, 64, np)
    e, c, targets = inputs
    assert inputs.shape == (300, 250, 64)
    assert (e.shape, c.shape, targets.shape) == ((300, 64), (250, 64), (300,))
    assert e.dtype == c.dtype == ml_dtypes.bfloat16
    logits = e.astype(np.float64) @ c.astype(np.float64).T
    assert logits.std() == pytest.approx(2, rel=0.02)
    assert len(np.unique(e[:, 0].astype(np.float64))) > 200  # no part is the one before once more
    assert targets.max() < 250
