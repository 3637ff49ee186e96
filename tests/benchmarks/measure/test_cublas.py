"""The parts in which cuBLAS computes its product."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.measure import cublas


@pytest.mark.parametrize(
    ("N", "V", "widths"),
    [
        (8192, 256_000, [128_000] * 2),
        (8192, 131_072, [131_072]),
        (16_384, 151_936, [75_968] * 2),
        (1, 1, [1]),
        (20_000, 100_001, [50_008, 49_993]),
    ],
)
def test_parts_of_the_product(N, V, widths):
    parts = cublas.parts_of(N, V)
    assert [min(part.stop, V) - part.start for part in parts] == widths
    assert [part.start for part in parts] == [0, *np.cumsum(widths)[:-1]]
    assert max(widths) * N * 2 <= 3e9
