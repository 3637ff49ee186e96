"""What tests of `reference/` compare with: errors relative to the largest entry, and finite differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


def assert_close(actual: Any, expected: Any, tol: float = 1e-12) -> None:
    """Equal shapes, error relative to the largest expected entry: NaN fails, and so does zero in place of nonzero."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    if expected.size:
        assert np.max(np.abs(actual - expected)) <= tol * np.max(np.abs(expected))


def assert_near(actual: Any, expected: Any, tol: float = 1e-12) -> None:
    """Equal shapes, error relative to 1 plus the largest expected entry: for what may cancel to nothing. NaN fails."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    assert np.max(np.abs(actual - expected), initial=0.0) <= tol * (1 + np.max(np.abs(expected), initial=0.0))


def assert_same_gradients(actual: Any, expected: Any, tol: float = 1e-12) -> None:
    """`assert_close` of e, c and bias."""
    for name in ("e", "c", "bias"):
        assert_close(getattr(actual, name), getattr(expected, name), tol)


def finite_difference(objective: Callable[[], Any], parameter: np.ndarray) -> np.ndarray:
    """The gradient of what `objective` returns, with respect to a parameter that it reads, to some 1e-10 of its size."""
    h = 1e-5  # error h^2 = 1e-10 of the third derivative, rounding 1e-16 / h = 1e-11
    numeric = np.zeros(parameter.shape)
    for index in np.ndindex(parameter.shape):
        exact, values = parameter[index], []
        for parameter[index] in (exact + h, exact - h):
            values.append(objective())
        parameter[index] = exact
        numeric[index] = (values[0] - values[1]) / (2 * h)
    return numeric
