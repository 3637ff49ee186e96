"""With `batch_invariant=True` sums are cut by the vocabulary alone: what tests/backends cannot see in the simulator's sizes."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from cce_numba import gpu
from cce_numba.options import Options
from cce_numba.simt import backward, forward
from cce_numba.simt.tiles import GPU_TILES
from tests.helpers.harness import SimulatorHarness

pytestmark = pytest.mark.skipif(SimulatorHarness.is_active(), reason="about the sizes of a real GPU")
TOKENS = (1, 200, 8192, 10**6)


def chunks(invariant, V):
    options = Options.of(np.dtype(np.float32), {"batch_invariant": invariant})
    problems = [SimpleNamespace(N=N, V=V, options=options, compute_dtype=np.dtype(np.float32)) for N in TOKENS]
    return {backward.chunk_of(p, GPU_TILES) for p in problems}


@pytest.mark.parametrize("V", [100, 50_000, 256_000])
def test_chunks_of_the_backward(V):
    assert len(chunks(True, V)) == 1
    assert chunks(True, V) == {min(1024, -(-V // 128) * 128)}
    assert V == 100 or len(chunks(False, V)) > 1


@pytest.mark.parametrize("v_tiles", [1, 7, 2000])
def test_splits_of_the_forward(v_tiles, monkeypatch):
    found = set()
    for multiprocessors in (1, 16, 132):
        monkeypatch.setattr(gpu, "current", lambda m=multiprocessors: SimpleNamespace(multiprocessors=m))
        found |= {forward.count_splits(-(-N // 128), v_tiles, True) for N in TOKENS}
    assert len(found) == 1
    if v_tiles == 2000:
        assert found == {16}
        assert len({forward.count_splits(-(-N // 128), v_tiles, False) for N in TOKENS}) > 1
