"""Inputs made of an archive."""

from __future__ import annotations

import numpy as np

from benchmarks.data import archive as archives
from benchmarks.data import real, rows


def test_real_inputs_keep_the_logits_and_lower_those_of_copies(archive, monkeypatch):
    monkeypatch.setattr(rows, "ROWS", 50)
    source = archives.read(archive)
    e, c, targets = real.make(source, 70, 150, 24, np)
    assert (e.shape, c.shape, targets.dtype) == ((70, 24), (150, 24), np.int64)
    assert np.array_equal(targets, np.tile(source.targets, 3)[:70])
    exact_logits, logits = source.e @ source.c.T, e.astype(np.float32) @ c.astype(np.float32).T
    magnitude = np.linalg.norm(source.e, axis=1)[:, None] * np.linalg.norm(source.c, axis=1)
    for repeat in (logits[:30, :60], logits[30:60, :60]):
        assert np.all(abs(repeat - exact_logits) <= 2**-7 * magnitude)  # two roundings to bfloat16
    lowered = logits[:30, :60].mean(axis=0) - logits[:30, 60:120].mean(axis=0)
    np.testing.assert_allclose(lowered, real.NATS_PER_COPY, atol=0.1)
    lowered = logits[:30, :30].mean(axis=0) - logits[:30, 120:].mean(axis=0)
    np.testing.assert_allclose(lowered, 2 * real.NATS_PER_COPY, atol=0.1)
