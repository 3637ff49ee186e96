"""Text to learn: what is drawn, what a file must hold, how ids are spread, what is kept for validation."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.data import text as texts


def test_a_chain_gives_the_same_text_and_can_be_learned_from():
    text = texts.drawn(20_000, 100)
    np.testing.assert_array_equal(text.ids, texts.drawn(20_000, 100).ids)
    assert text.ids.shape == (20_000,)
    assert text.ids.dtype == np.uint16
    assert text.entries <= 100
    counts = np.sort(np.bincount(text.ids, minlength=100))[::-1]
    assert counts[:10].sum() > 3 * counts[-10:].sum()  # some symbols are common
    pairs = np.zeros((100, 100))
    np.add.at(pairs, (text.ids[:-1], text.ids[1:]), 1)
    following = np.sort(pairs / pairs.sum(axis=1, keepdims=True), axis=1)[:, ::-1]
    assert following[counts > 0, :4].sum(axis=1).mean() > 0.6  # a few followers take their 70 %


def test_ids_stay_as_they_are_or_are_spread_one_to_one():
    text = texts.Text("", np.arange(100, dtype=np.uint16))
    np.testing.assert_array_equal(text.spread(199), np.arange(100))
    spread = text.spread(200)
    assert len(np.unique(spread)) == 100
    assert 0 <= spread.min() < spread.max() < 200
    assert spread.max() > 150
    np.testing.assert_array_equal(spread, text.spread(200))


def test_validation_is_the_end_and_not_learned():
    training, validation = texts.split(np.arange(1000))
    np.testing.assert_array_equal(training, np.arange(950))
    np.testing.assert_array_equal(validation, np.arange(950, 1000))


def test_a_file_is_read(tmp_path):
    ids = np.arange(50, dtype=np.uint16)
    np.save(tmp_path / "ids.npy", ids)
    text = texts.read(str(tmp_path / "ids.npy"), 50)
    assert text.name == "ids.npy"
    assert text.entries == 50
    np.testing.assert_array_equal(text.ids, ids)
    with pytest.raises(ValueError, match="at least 51 token ids, got 50"):
        texts.read(str(tmp_path / "ids.npy"), 51)


@pytest.mark.parametrize(
    "array", [np.zeros(50, np.int32), np.zeros((5, 10), np.uint16), np.zeros((), np.uint16), np.zeros(50)], ids=str
)
def test_another_array_is_refused(array, tmp_path):
    np.save(tmp_path / "ids.npy", array)
    with pytest.raises(ValueError, match="1-d array of uint16") as error:
        texts.read(str(tmp_path / "ids.npy"), 5)
    assert f"got {array.dtype} of shape {array.shape}" in str(error.value)


def test_another_file_is_refused_and_nothing_in_it_executed(tmp_path):
    path = tmp_path / "ids.npy"
    np.save(path, np.array([print], object), allow_pickle=True)
    with pytest.raises(ValueError, match="Python objects"):
        texts.read(str(path), 5)
    for content in (b"", b"text", b"PK\3\4"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="magic string"):
            texts.read(str(path), 5)
    with pytest.raises(OSError, match="absent"):
        texts.read(str(tmp_path / "absent"), 5)
