"""Statistics of a softmax against those of stored probabilities."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.data import Inputs, calibrated, sparsity


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
def test_statistics_are_those_of_stored_probabilities(blocks, monkeypatch):
    monkeypatch.setattr(sparsity, "_ROWS", 300)
    e, c, _ = calibrated.make(150, 1000, calibrated.RANK + 8, np)  # N and V are no multiples of a block
    targets = np.random.default_rng(0).integers(0, len(c), len(e))  # rare ones: they survive as targets alone
    eps = (2.0**-5, 2.0**-10)
    ours = sparsity.measure(Inputs(e, c, targets), np, blocks, eps)
    for i, x in enumerate(eps):
        reference = brute_force(e, c, targets, [0, 1] if blocks is None else blocks, x)
        per_eps = [getattr(ours, field)[i] for field in ("columns", "union", "tiles", "dropped", "entries")]
        np.testing.assert_allclose([*per_eps, ours.loss], reference, rtol=1e-4, atol=1e-6)
