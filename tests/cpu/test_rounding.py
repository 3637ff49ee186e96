"""Gradients of 16 bits are sums of the compute dtype, rounded once."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import cce_numba as cce
import reference
from cce_numba.cpu import backend
from cce_numba.cpu.tiles import choose_tiles
from tests.helpers.cases import DTYPES, make_case
from tests.helpers.checks import unit_of


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("group", [1000, 40])  # tokens whose gradient is summed at once
def test_each_element_is_within_one_rounding(monkeypatch, dtype, smoothing, accumulate, group):
    """Where the target's part and that of label smoothing cancel, a part that was rounded before would be off by far more."""
    monkeypatch.setattr(backend, "choose_tiles", lambda p: dataclasses.replace(choose_tiles(p), dE_group=group))
    case = make_case(3, (150,), 300, 8, dtype, ignored=0.2, bias=True, label_smoothing=smoothing, filter_eps=None)
    case.options["class_weights"] = np.random.default_rng(0).uniform(0.5, 1.5, 300)
    before = 2.0**-7
    out = cce.Gradients(
        **{name: np.full_like(x, before) for name, x in (("e", case.e), ("c", case.c), ("bias", case.options["bias"]))}
    )
    _, grads = cce.linear_cross_entropy_with_grad(
        case.e, case.c, case.targets, out=out, accumulate=accumulate, backend="cpu", **case.options
    )
    options = {name: x for name, x in case.options.items() if name not in ("filter", "filter_eps")}
    exact = reference.backward(case.e, case.c, case.targets, **options)
    for name in ("e", "c", "bias"):
        expected = getattr(exact, name) + before * accumulate
        error = np.abs(getattr(grads, name).astype(np.float64) - expected)
        # A sum in float32 is off by some units of the largest of its terms.
        allowed = 1.01 * unit_of(dtype) * np.abs(expected) + 1e-6 * np.abs(expected).max() + 1e-7
        assert (error <= allowed).all(), (name, (error / allowed).max())
