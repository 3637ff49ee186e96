"""Reading an archive: what is in it, and what is refused."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from benchmarks.data import archive as archives
from cce_numba.commands import npz


def test_an_archive_is_read(archive, archive_arrays):
    found = archives.read(archive)
    assert found.name == "layer.npz"
    q, scale = archive_arrays["classifier_q"], archive_arrays["classifier_scale"].astype(np.float32)
    np.testing.assert_array_equal(found.c, np.concatenate([q[:, group] * scale[:, group, None] for group in (0, 1)], axis=1))
    embeddings = archive_arrays["embeddings_bf16"].view(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(found.e, embeddings.astype(np.float32))
    assert found.e.dtype == found.c.dtype == np.float32
    np.testing.assert_array_equal(found.targets, archive_arrays["targets"])


def test_an_archive_is_only_extended(archive):
    source = archives.read(archive)
    assert source.why_not(60, 8) is None
    assert source.why_not(59, 8) == source.why_not(60, 7) == "V must be at least 60 and D at least 8"


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("classifier_scale", None, "lacks classifier_scale"),
        ("classifier_scale", np.ones((60, 3), np.float16), r"classifier_scale must have shape \(60, 2\)"),
        ("embeddings_bf16", np.ones((30, 9), np.uint16), r"embeddings_bf16 must have shape \(30, 8\)"),
        ("embeddings_bf16", np.ones((30, 8), np.uint8), "embeddings_bf16 must be uint16, got uint8"),
        ("embeddings_bf16", np.ones((30, 8), np.float32), "embeddings_bf16 is float32"),
        ("targets", np.ones((29,), np.int32), r"targets must have shape \(30,\)"),
        ("targets", np.full((30,), 60), r"targets must lie in \[0, 60\), they lie in \[60, 60\]"),
        ("targets", np.full((30,), -1), r"targets must lie in \[0, 60\)"),
        ("targets", np.full((30,), None), "targets is object"),
        ("classifier_q", np.ones((60, 8), np.int8), "classifier_q must have 3 dimensions"),
    ],
)
def test_an_archive_of_another_kind_is_refused(archive_arrays, name, array, message, tmp_path):
    changed = archive_arrays | {name: array}
    np.savez(tmp_path / "other.npz", **{key: value for key, value in changed.items() if value is not None})
    with pytest.raises(ValueError, match=message):
        archives.read(str(tmp_path / "other.npz"))


def test_an_archive_without_tokens_is_refused(archive_arrays, tmp_path):
    few = {name: archive_arrays[name][:0] for name in ("embeddings_bf16", "targets", "loss_fp32")}
    np.savez(tmp_path / "empty.npz", **archive_arrays | few)
    with pytest.raises(ValueError, match="holds 0 tokens"):
        archives.read(str(tmp_path / "empty.npz"))


def test_float32_numbers_are_counted_before_anything_is_read(archive, monkeypatch):
    """Stored numbers are small; what they become may not be."""
    monkeypatch.setattr(npz.os, "sysconf", lambda name: 1 if name == "SC_PAGE_SIZE" else 4 * 4 * 8 * (60 + 30) - 1)
    monkeypatch.setattr(npz, "arrays", lambda *_: pytest.fail("read"))
    with pytest.raises(ValueError, match="would take"):
        archives.read(archive)
