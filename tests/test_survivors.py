"""Asking for the dropped mass takes memory that does not grow with the vocabulary."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

import cce_numba as cce
from tests.helpers.cases import DTYPES, make_case


@pytest.mark.parametrize(("N", "V", "D"), [(4096, 20_000, 64), (300, 3000, 20_000)], ids=["long", "deep"])
def test_memory_is_bounded(N, V, D):
    case = make_case(0, (N,), V, D, DTYPES[2], spread=0.5)
    result = cce.forward(case.e, case.c, case.targets, backend="cpu", filter_eps=0.01)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        mass = result.dropped_mass()
        extra = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert extra <= 80 * 2**20
    assert np.median(mass) > 0
