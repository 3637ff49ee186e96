"""The probability mass that the filter drops, per token, against the reference's with the same entries kept."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import reference
from cce_numba import survivors
from tests.helpers.cases import DTYPES, Case, cases, filters, make_case
from tests.helpers.checks import assert_within, compute_unit, expect

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def check_mass(harness, case, result):
    expected = expect(case)
    mass = harness.host(result.dropped_mass())
    assert mass.dtype == (np.float64 if case.e.dtype == np.float64 else np.float32)
    exact, tolerance = np.zeros(expected.forward.nll.shape), np.zeros(expected.forward.nll.shape)
    kept = harness.kept(result, case.c.shape[0])
    if kept is not None and len(kept):
        p = np.exp(expected.forward.logits - expected.forward.lse[expected.valid][:, None])
        unit = compute_unit(case.e.dtype)
        error = p * np.expm1(expected.z_error + expected.lse_error[:, None]) + 16 * unit * p + 1e-37
        exact[expected.valid] = reference.dropped_mass(p, kept)
        tolerance[expected.valid] = np.where(kept, 0, error).sum(axis=1) + unit * exact[expected.valid]
    assert_within("dropped_mass", mass, exact, tolerance)
    return mass


@given(data=st.data())
def test_any_problem(harness, edges, data):
    case = data.draw(cases(edges))
    case = case.with_options(**data.draw(filters()))
    rows = data.draw(st.sampled_from([8, 16, 1024]), label="rows at a time")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(survivors, "_MOST_ROWS", rows)
        check_mass(harness, case, harness.forward(case))


@pytest.mark.parametrize("rows", [8, 1024])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_peaked_logits_drop_a_part(harness, edges, monkeypatch, dtype, rows):
    """Each block of tokens keeps other entries than the next one."""
    harness.skip_unless_it_takes(dtype)
    monkeypatch.setattr(survivors, "_MOST_ROWS", rows)
    N = edges.n[-1] + 1
    case = make_case(5, (N,), edges.v[-1] + 1, edges.d[-1] + 1, np.dtype(np.float64), ignored=0.2)
    targets = np.arange(N) * 7 // N
    near = case.c[targets] + 0.1 * case.e
    case = Case(near.astype(dtype), case.c.astype(dtype), np.where(case.targets < 0, -100, targets))
    case = case.with_options(filter_eps=0.1, bias=np.linspace(-1, 1, len(case.c)).astype(dtype), softcap=20.0)
    mass = check_mass(harness, case, harness.forward(case))
    assert (mass[case.targets == -100] == 0).all()
    assert mass.max() > 0.05


def test_exact_gradients_drop_nothing(harness, edges):
    case = make_case(6, (2, edges.n[-1]), edges.v[-1] + 1, edges.d[-1], edges.dtype, filter_eps=None)
    mass = harness.host(harness.forward(case).dropped_mass())
    assert mass.shape == (2, edges.n[-1])
    assert not mass.any()


def test_lost_tokens_drop_nothing(harness, edges):
    """NaN in a row, a target out of range: their blocks keep everything."""
    block = edges.n[-2] if len(edges.n) > 2 else edges.n[-1]
    case = make_case(7, (4 * block,), edges.v[-1] + 1, edges.d[-1], edges.dtype, spread=6.0)
    case = case.with_options(filter_eps=2.0**-4, check_targets=False)
    case.e[0, 0] = np.nan
    case.targets[-1] = len(case.c)
    result = harness.forward(case)
    mass, kept = harness.host(result.dropped_mass()), harness.kept(result, len(case.c))
    if kept is None:
        kept = np.ones((len(case.e), len(case.c)), bool)
    assert kept[[0, -1]].all()
    assert mass[0] == mass[-1] == 0
    assert np.isfinite(mass).all()
