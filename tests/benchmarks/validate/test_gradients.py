"""The judge of gradients: what it takes for right is right, and errors are what they are said to be."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import reference
from benchmarks.data import random
from benchmarks.validate import gradients as truth


@pytest.fixture
def small():
    """Inputs, and the reference's gradients of their mean loss."""
    inputs = random.make(300, 1000, 32, np)
    return inputs, reference.backward(*inputs)


@pytest.mark.parametrize("logits", [1000 * 70, 1, 2**28])  # of 70 tokens, of one, of all
def test_exact_gradients_are_those_of_the_reference(small, logits, monkeypatch):
    monkeypatch.setattr(truth, "_LOGITS", logits)
    monkeypatch.setattr(truth, "_ROWS", 70)
    inputs, expected = small
    found = truth.compute(inputs)
    assert found.loss == pytest.approx(float(reference.forward(*inputs).loss), rel=1e-6)
    for name, gradient in found.gradients.items():
        right = getattr(expected, name)
        assert gradient.dtype == np.float32
        assert np.linalg.norm(gradient - right) <= 1e-5 * np.linalg.norm(right)
        rounded = right.astype(ml_dtypes.bfloat16).astype(np.float64)
        rounding = np.linalg.norm(rounded - right) / np.linalg.norm(right)
        assert found.rounding[name] == pytest.approx(rounding, rel=0.01)
        assert 1e-3 < rounding < 2**-8


def test_gradients_are_not_judged_by_tf32(small, monkeypatch):
    monkeypatch.setenv("CUPY_TF32", "1")
    with pytest.raises(RuntimeError, match="CUPY_TF32"):
        truth.compute(small[0])


def test_errors_and_zero_rows_of_gradients(monkeypatch):
    monkeypatch.setattr(truth, "_ROWS", 3)
    right = np.random.default_rng(0).standard_normal((10, 4)).astype(np.float32)
    assert truth.error(right, right) == 0
    assert truth.error(1.5 * right, right) == pytest.approx(0.5)
    assert truth.error(0 * right, right) == 1
    wrong = right.copy()
    wrong[9, 3] += 1
    assert truth.error(wrong, right) == pytest.approx(1 / np.linalg.norm(right), rel=1e-5)
    wrong[9, 3] = np.nan
    assert np.isnan(truth.error(wrong, right))
    right[[0, 3, 9]], right[4, 1:] = 0, 0
    assert truth.zero_rows(right.astype(ml_dtypes.bfloat16)) == pytest.approx(0.3)
