"""Names of ways, and what they stand for."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("torch", reason="PyTorch is not installed")

import torch

from benchmarks.training.ways import DEFAULT, way, ways
from cce_numba.options import Options


def test_the_thresholds_of_auto_are_ours():
    for dtype, same in ((torch.bfloat16, ml_dtypes.bfloat16), (torch.float32, np.float32)):
        for name in ("drop", "unbiased"):
            found = way(name, 1000, dtype)
            assert found.options == {"filter": name, "filter_eps": "auto"}
            assert found.eps == Options.of(np.dtype(same), found.options).filter_eps
        assert Options.of(np.dtype(same), way("exact", 1000, dtype).options).filter_eps is None


def test_names_are_taken_apart():
    found = way("unbiased:16/V", 65_536, torch.bfloat16)
    assert found.options == {"filter": "unbiased", "filter_eps": 2.0**-12}
    assert way("drop:2^-12", 7, torch.bfloat16).options == {"filter": "drop", "filter_eps": 2.0**-12}
    assert way("paper", 7, torch.bfloat16).eps == 2.0**-12


@pytest.mark.parametrize("name", ["", "keep", "drop:", "drop:2^-0", "drop:1e-3", "exact:2^-9", "paper:2^-9", "unbiased:0/V"])
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match="none of exact"):
        way(name, 1000, torch.bfloat16)


def test_a_threshold_of_1_is_refused():
    with pytest.raises(ValueError, match="below 1 for V=16"):
        way("drop:16/V", 16, torch.bfloat16)


def test_what_is_the_same_is_taken_once():
    def names(vocabulary):
        return [each.name for each in ways(list(DEFAULT), vocabulary, torch.bfloat16)]

    assert names(49_152) == list(DEFAULT)
    assert names(262_144) == [name for name in DEFAULT if not name.endswith("/V")]
