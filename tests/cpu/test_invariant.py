"""Products of the CPU whose rows do not depend on their neighbours."""

from __future__ import annotations

import numpy as np
import pytest

from cce_numba.cpu import invariant

SHAPES = [(1, 1), (3, 5), (37, 131), (64, 1000), (768, 520)]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_row_by_itself_and_among_others(shape, order, dtype):
    rng = np.random.default_rng(0)
    b = np.asarray(rng.normal(size=shape), dtype, order=order)
    rows = rng.normal(size=(150, shape[0])).astype(dtype)
    together = invariant.multiply(rows, b)
    np.testing.assert_allclose(together, rows @ b, rtol=1e-4, atol=1e-4)
    for start, stop in ((0, 1), (7, 8), (3, 70), (140, 150)):
        np.testing.assert_array_equal(invariant.multiply(rows[start:stop], b), together[start:stop])


def test_a_number_of_rows_whose_places_differ_is_not_taken(monkeypatch):
    """Of a BLAS that adds in another order from the fifth row on, as if by another kernel."""
    matmul = np.matmul

    def by_place(a, b, out=None):
        result = matmul(a, b)
        result[4:] = matmul(a[4:, ::-1], b[::-1])
        if out is not None:
            out[...] = result
        return result

    monkeypatch.setattr(np, "matmul", by_place)
    invariant.rows_of.cache_clear()
    assert invariant.rows_of(100, 50, np.dtype(np.float32), True) == 4
    monkeypatch.undo()
    invariant.rows_of.cache_clear()


def test_blocks_do_not_depend_on_the_number_of_tokens():
    from cce_numba.arguments import Outline
    from cce_numba.cpu.tiles import choose_tiles
    from cce_numba.options import Options

    for dtype in (np.float16, np.float32):
        for D in (64, 4096, 2**16):
            options = Options.of(np.dtype(dtype), {"batch_invariant": True})
            tiles = {choose_tiles(Outline(N, 50_000, D, np.dtype(dtype), False, "cpu", options)) for N in (1, 100, 10**6)}
            assert len(tiles) == 1
