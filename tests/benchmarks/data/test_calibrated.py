"""Made-up inputs: the same each time, as they are said to be, as sparse as a real model's."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from benchmarks.data import calibrated, rows, sparsity

D = calibrated.RANK + 8
SMALL = (150, 1000, D)  # N and V are no multiples of a block


@pytest.fixture(scope="module")
def small():
    return calibrated.make(*SMALL, np)


def test_same_seed_same_bits_and_another_seed_others(small):
    for x, again, other in zip(small, calibrated.make(*SMALL, np), calibrated.make(*SMALL, np, seed=1), strict=True):
        assert x.tobytes() == again.tobytes()
        assert x.tobytes() != other.tobytes()


def test_shapes_dtypes_and_values(small):
    e, c, targets = small
    N, V, D = SMALL
    assert (e.shape, c.shape, targets.shape) == ((N, D), (V, D), (N,))
    assert e.dtype == c.dtype == ml_dtypes.bfloat16
    assert targets.dtype == np.int64
    assert all(np.isfinite(x.astype(np.float32)).all() for x in (e, c))
    assert targets.min() >= 0
    assert targets.max() < V
    assert np.mean(e.astype(np.float32) ** 2) == pytest.approx(1, rel=1e-3)


def test_lift_leaves_logits_as_they_are(small):
    # The lift has random numbers of its own, so tokens and entries are the same at another D.
    wider = calibrated.make(SMALL[0], SMALL[1], 2 * D, np)
    z, z_wider = (e.astype(np.float32) @ c.astype(np.float32).T for e, c, _ in (small, wider))
    assert np.abs(z - z_wider).max() <= 0.01 * np.abs(z).max()  # each is rounded to bfloat16
    assert np.array_equal(small[2], wider[2])


def test_rows_made_at_a_time_do_not_matter(small, monkeypatch):
    monkeypatch.setattr(rows, "ROWS", 70)
    for x, y in zip(small, calibrated.make(*SMALL, np), strict=True):
        # A BLAS may sum in another order, which shows where a value is next to the middle of two bfloat16 numbers.
        np.testing.assert_allclose(x.astype(np.float32), y.astype(np.float32), rtol=2**-7, atol=1e-5)


def test_drawn_targets_are_the_quantiles_of_the_softmax():
    p = np.array([0.1, 0.2, 0.3, 0.4])
    quantiles = np.array([0.0, 0.05, 0.15, 0.29, 0.31, 0.59, 0.61, 0.999])
    e = np.ones((len(quantiles), 1), np.float32)
    c = np.log(p).astype(np.float32)[:, None]
    assert calibrated._drawn(e, c, quantiles, np).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_hidden_size_too_small():
    with pytest.raises(ValueError, match=f"more than {calibrated.RANK}, got {calibrated.RANK}"):
        calibrated.make(10, 10, calibrated.RANK, np)


def test_sparse_as_a_real_model_at_a_tenth_of_its_size():
    # The rarest nine tenths of the vocabulary are not there. They hardly ever survive, so the rest keep their numbers.
    inputs = calibrated.make(512, 25_600, D, np)
    ours, real = sparsity.measure(inputs, np), sparsity.REAL
    assert 0.6 * real.loss <= ours.loss <= 1.4 * real.loss
    assert 0.5 * real.entries[0] <= ours.entries[0] <= 1.5 * real.entries[0]
    assert all(x >= y for x, y in zip(ours.columns, real.columns, strict=True))
    assert ours.columns[0] <= 10 * real.columns[0]
    assert all(x <= 2 * y for x, y in zip(ours.dropped, real.dropped, strict=True))
