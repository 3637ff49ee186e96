"""The judge of a forward passes what is right, and nothing else."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import cce_numba as cce
from benchmarks.data import random
from benchmarks.errors import Wrong
from benchmarks.validate import forward as truth

EPS = 2.0**-5  # at which few of 1000 columns survive


@pytest.fixture
def inputs():
    return random.make(300, 1000, 32, np)


@pytest.fixture
def computed(inputs):
    """`(exact, result)` of 300 tokens: blocks 0 and 2 are looked at, and some tokens of block 1."""
    return truth.compute(inputs, 128), cce.forward(*inputs, filter_eps=EPS)


def test_what_is_right_passes(computed, inputs, monkeypatch):
    expected, result = computed
    assert truth.check(expected, lse=result.lse, target_logit=result.target_logit)["lse"] < 1
    shares = truth.check_survivors(expected, result, EPS)
    assert 0.05 < shares["surviving"] <= shares["flagged"] < 1
    monkeypatch.setattr(truth, "_NUMBERS", 32 * 77)  # several parts of the vocabulary, the last one smaller
    np.testing.assert_allclose(truth.compute(inputs, 128).lse, expected.lse, rtol=1e-12)


@pytest.mark.parametrize("wrong", [1e-3, np.nan])
@pytest.mark.parametrize("name", ["lse", "target_logit"])
@pytest.mark.parametrize("token", [0, 127, 256, 299])
def test_a_wrong_token_does_not_pass(computed, name, token, wrong):
    expected, result = computed
    values = getattr(result, name).copy()
    values[token] += wrong
    with pytest.raises(Wrong, match=name):
        truth.check(expected, **{name: values})


@pytest.mark.parametrize("block", [0, 2])
def test_a_missed_survivor_does_not_pass(computed, block):
    expected, result = computed
    target = int(expected.targets[expected.tokens // 128 == block][0])
    survivors = result._statistics.survivors.copy()
    survivors[block, target // 8] &= ~np.uint8(1 << target % 8)
    missing = dataclasses.replace(result, _statistics=dataclasses.replace(result._statistics, survivors=survivors))
    with pytest.raises(Wrong, match=f"1 columns missed in block {block}, the first is {target}"):
        truth.check_survivors(expected, missing, EPS)
