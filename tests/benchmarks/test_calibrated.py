"""`benchmarks/calibrated.py`: its inputs, and its statistics against those of stored probabilities."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from rich.console import Console

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
calibrated, inputs = map(importlib.import_module, ("calibrated", "inputs"))
sys.path.pop()

D = calibrated.RANK + 8
SMALL = (150, 1000, D)  # N and V are no multiples of a block


@pytest.fixture(scope="module")
def small():
    return calibrated.calibrated(*SMALL, np)


def test_same_seed_same_bits_and_another_seed_others(small):
    for x, again, other in zip(
        small, calibrated.calibrated(*SMALL, np), calibrated.calibrated(*SMALL, np, seed=1), strict=True
    ):
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
    wider = calibrated.calibrated(SMALL[0], SMALL[1], 2 * D, np)
    z, z_wider = (e.astype(np.float32) @ c.astype(np.float32).T for e, c, _ in (small, wider))
    assert np.abs(z - z_wider).max() <= 0.01 * np.abs(z).max()  # each is rounded to bfloat16
    assert np.array_equal(small[2], wider[2])


def test_rows_made_at_a_time_do_not_matter(small, monkeypatch):
    monkeypatch.setattr(inputs, "_ROWS", 70)
    for x, y in zip(small, calibrated.calibrated(*SMALL, np), strict=True):
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
        calibrated.calibrated(10, 10, calibrated.RANK, np)


def brute_force(e, c, targets, blocks, eps):
    """Out of stored probabilities, in float64, block by block and entry by entry."""
    z = e.astype(np.float64) @ c.astype(np.float64).T
    p = np.exp(z - z.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    tokens = [n for block in blocks for n in range(128 * block, min(128 * (block + 1), len(e)))]
    columns, tiles, union, dropped, entries = [], [], set(), [], []
    for block in blocks:
        here = [n for n in tokens if n // 128 == block]
        kept = {v for v in range(len(c)) if p[here, v].max() >= eps} | {int(targets[n]) for n in here}
        columns.append(len(kept) / len(c))
        tiles.append(len({v // 128 for v in kept}) / -(-len(c) // 128))
        union |= kept
        dropped += [1 - p[n, sorted(kept)].sum() for n in here]
        entries += [(p[n] >= eps).sum() for n in here]
    loss = -np.log(p[tokens, targets[tokens]]).mean()
    return [np.mean(columns), len(union) / len(c), np.mean(tiles), np.mean(dropped), np.mean(entries), loss]


# All blocks, of which the last is of 22 tokens; and one alone, out of order.
@pytest.mark.parametrize("blocks", [None, [1], [1, 0]])
def test_statistics_are_those_of_stored_probabilities(small, blocks, monkeypatch):
    monkeypatch.setattr(calibrated, "_ROWS", 300)
    e, c, _ = small
    targets = np.random.default_rng(0).integers(0, SMALL[1], SMALL[0])  # rare ones: they survive as targets alone
    eps = (2.0**-5, 2.0**-10)
    ours = calibrated.statistics(e, c, targets, np, blocks, eps)
    for i, x in enumerate(eps):
        reference = brute_force(e, c, targets, [0, 1] if blocks is None else blocks, x)
        per_eps = [getattr(ours, field)[i] for field in ("columns", "union", "tiles", "dropped", "entries")]
        np.testing.assert_allclose([*per_eps, ours.loss], reference, rtol=1e-4, atol=1e-6)


def test_sparse_as_a_real_model_at_a_tenth_of_its_size():
    # The rarest nine tenths of the vocabulary are not there. They hardly ever survive, so the rest keep their numbers.
    e, c, targets = calibrated.calibrated(512, 25_600, D, np)
    ours, real = calibrated.statistics(e, c, targets, np), calibrated.REAL
    assert 0.6 * real.loss <= ours.loss <= 1.4 * real.loss
    assert 0.5 * real.entries[0] <= ours.entries[0] <= 1.5 * real.entries[0]
    assert all(x >= y for x, y in zip(ours.columns, real.columns, strict=True))
    assert ours.columns[0] <= 10 * real.columns[0]
    assert all(x <= 2 * y for x, y in zip(ours.dropped, real.dropped, strict=True))


def test_command_prints_the_fit(monkeypatch, capsys):
    monkeypatch.setattr(calibrated.machine, "why_no_gpu", lambda: "none here")
    monkeypatch.setattr(calibrated, "Console", lambda width: Console(width=width, file=sys.stdout))
    calibrated.main(["--shape", "300", "2000", str(D), "--blocks", "2"])
    printed = capsys.readouterr().out
    assert "2 of 3 blocks" in printed
    assert "3.06" in printed
    with pytest.raises(SystemExit):
        calibrated.main(["--shape", "300", "2000", "10"])
