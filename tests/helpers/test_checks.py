"""The helpers that judge are judged: they accept the truth and rounding, and refuse each way of being wrong."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cce_numba as cce
import reference
from tests.helpers.cases import DTYPES, Edges, cases, make_case, sizes
from tests.helpers.checks import assert_within, check_forward, check_gradients, check_survivors, expect
from tests.helpers.harness import Poisoned

CASE = make_case(0, (40,), 50, 12, np.dtype(np.float32), bias=True, softcap=8.0, ignored=0.2)


def test_assert_within():
    exact = np.array([1.0, np.nan, np.inf])
    assert_within("x", np.array([1.1, np.nan, np.inf]), exact, 0.2)
    for wrong in ([1.3, np.nan, np.inf], [np.nan, np.nan, np.inf], [1.0, 0.0, np.inf], [1.0, np.nan, 1e300]):
        with pytest.raises(AssertionError, match="x"):
            assert_within("x", np.array(wrong), exact, 0.2)
    with pytest.raises(AssertionError, match="shape"):
        assert_within("x", np.ones(2), exact, 0.2)
    with pytest.raises(AssertionError, match=r"x\[0\] = 1.3"):
        assert_within("x", np.array([1.3, np.nan, np.inf]), exact, 0.2)


def numbers_of(expected):
    forward, wide = expected.forward, np.float64 if expected.case.e.dtype == np.float64 else np.float32
    numbers = {name: np.asarray(getattr(forward, name), wide) for name in ("loss", "nll", "lse", "target_logit")}
    return numbers | {"n_valid": np.array(forward.n_valid)}


def test_the_reference_rounded_is_accepted():
    expected = expect(CASE)
    check_forward(expected, numbers_of(expected))
    exact = reference.backward(CASE.e, CASE.c, CASE.targets, **expected.options)
    check_gradients(expected, cce.Gradients(*(x.astype(np.float32) for x in (exact.e, exact.c, exact.bias))))


@pytest.mark.parametrize("name", ["loss", "nll", "lse", "target_logit"])
@pytest.mark.parametrize("factor", [0.0, 1.0001, np.nan])
def test_wrong_forwards_are_refused(name, factor):
    expected = expect(CASE)
    numbers = numbers_of(expected)
    numbers[name] = (numbers[name] * factor).astype(np.float32)
    with pytest.raises(AssertionError, match=name):
        check_forward(expected, numbers)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["e", "c", "bias"])
@pytest.mark.parametrize("how", ["zeros", "scaled", "no target term", "a tile skipped", "nan"])
def test_wrong_gradients_are_refused(name, how, dtype):
    case = make_case(0, (40,), 50, 12, dtype, bias=True)
    expected = expect(case)
    exact = reference.backward(case.e, case.c, case.targets, **expected.options)
    right = {name: getattr(exact, name) for name in ("e", "c", "bias")}
    if how == "no target term":
        # d_lse alone gives the softmax without the one-hot.
        softmax = reference.backward(case.e, case.c, case.targets, d_loss=0.0, d_lse=1 / 40, **expected.options)
        wrong = getattr(softmax, name)
    elif how == "a tile skipped":
        wrong = right[name].copy()
        wrong[:8] = 0
    else:
        wrong = right[name] * {"zeros": 0.0, "scaled": 1.05, "nan": np.nan}[how]
    grads = {k: (wrong if k == name else v).astype(dtype) for k, v in right.items()}
    with pytest.raises(AssertionError, match=f"grads.{name}"):
        check_gradients(expected, cce.Gradients(**grads))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_g_may_be_rounded_once(dtype):
    """To the inputs' dtype, as tensor cores take it, in gradients of float32; but not to one bit less."""
    case = make_case(1, (40,), 50, 12, dtype, reduction="sum", accum_e_fp32=True, accum_c_fp32=True)
    expected = expect(case)
    e, c = (x.astype(np.float64) for x in (case.e, case.c))
    g = np.exp(expected.forward.logits - expected.forward.lse[:, None]) - reference.onehot(case.targets, 50)

    def check(g):
        check_gradients(expected, cce.Gradients(e=(g @ c).astype(np.float32), c=(g.T @ e).astype(np.float32)))

    check(g)
    check(g.astype(dtype).astype(np.float64))
    sign = np.where(np.outer(np.ones(40), c[:, 0]) > 0, 1, -1)
    check(g + 2.0**-12 * np.abs(g) * sign if dtype == np.float16 else g + 2.0**-9 * np.abs(g) * sign)
    with pytest.raises(AssertionError, match="grads"):
        check(g + 2.0 ** (-10 if dtype == np.float16 else -7) * np.abs(g) * sign)


TERMS = {
    "logit_scale": 0.5,
    "label_smoothing": 0.1,
    "z_loss": 0.01,
    "class_weights": np.linspace(0.1, 2, 50),
    "token_weights": np.linspace(0.1, 2, 40),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 8.0])
@pytest.mark.parametrize("name", TERMS)
def test_a_missing_term_is_refused(name, softcap, dtype):
    """In the loss, in dE and in dC; and the reference with all of them, rounded, is accepted."""
    case = make_case(0, (40,), 50, 12, dtype, softcap=softcap, reduction="sum").with_options(**TERMS)
    expected = expect(case)
    check_forward(expected, numbers_of(expected))
    right = reference.backward(case.e, case.c, case.targets, **expected.options)
    check_gradients(expected, cce.Gradients(right.e.astype(dtype), right.c.astype(dtype)))
    without = {k: v for k, v in expected.options.items() if k != name}
    numbers = numbers_of(expected)
    numbers["loss"] = reference.forward(case.e, case.c, case.targets, **without).loss.astype(numbers["loss"].dtype)
    with pytest.raises(AssertionError, match="loss"):
        check_forward(expected, numbers)
    wrong = reference.backward(case.e, case.c, case.targets, **without)
    with pytest.raises(AssertionError, match=r"grads\.e"):
        check_gradients(expected, cce.Gradients(wrong.e.astype(dtype), right.c.astype(dtype)))
    with pytest.raises(AssertionError, match=r"grads\.c"):
        check_gradients(expected, cce.Gradients(right.e.astype(dtype), wrong.c.astype(dtype)))


@pytest.mark.parametrize("name", ["e", "c", "bias"])
def test_what_a_coarser_threshold_leaves_out_is_allowed_for(name):
    """In dC and dbias, of columns that no token of a block gives so much or has as its target; and of no others."""
    case = make_case(3, (200,), 50, 12, np.dtype(np.float32), bias=True, reduction="sum")
    case.targets[:] %= 25
    expected, kept = expect(case), np.ones((200, 50), bool)
    p = np.exp(expected.forward.logits - expected.forward.lse[:, None])
    largest = np.array([p[:128].max(axis=0), p[128:].max(axis=0)])
    coarse_eps = float(np.median(largest[:, 25:])) * 1.001

    def gradients(keep):
        exact = reference.backward(case.e, case.c, case.targets, keep_e=keep, keep_c=keep, **expected.options)
        return cce.Gradients(**{name: getattr(exact, name).astype(np.float32)})

    needed = reference.column_filter(p, case.targets, coarse_eps)
    assert 0.4 < needed[:, 25:].mean() < 0.6
    assert needed[:, :25].mean() > 0.9
    check_gradients(expected, gradients(kept), kept, coarse_eps=coarse_eps)
    if name == "e":
        with pytest.raises(AssertionError, match=r"grads\.e"):
            check_gradients(expected, gradients(needed), kept, coarse_eps=coarse_eps)
        return
    check_gradients(expected, gradients(needed), kept, coarse_eps=coarse_eps)
    with pytest.raises(AssertionError, match=f"grads.{name}"):
        check_gradients(expected, gradients(needed), kept)
    of_target, likely = np.argmax(needed[130, :25] & (largest[1, :25] < coarse_eps)), 25 + np.argmax(largest[1, 25:])
    assert largest[1, of_target] < coarse_eps < largest[1, likely]
    for v in (of_target, likely):
        too_few = needed.copy()
        too_few[128:, v] = False
        with pytest.raises(AssertionError, match=rf"grads.{name}\[{v}"):
            check_gradients(expected, gradients(too_few), kept, coarse_eps=coarse_eps)


def test_a_missed_survivor_is_refused():
    case = dataclasses.replace(CASE, options={})
    expected = expect(case)
    p = np.exp(expected.forward.logits - expected.forward.lse[expected.valid][:, None])
    kept = reference.column_filter(p, case.targets[expected.valid], 2.0**-6, 8)
    check_survivors(expected, kept, 2.0**-6, 8)
    check_survivors(expected, np.ones_like(kept), 2.0**-6, 8)
    worst = np.unravel_index(np.argmax(p), p.shape)
    kept[worst[0] // 8 * 8 : worst[0] // 8 * 8 + 8, worst[1]] = False
    with pytest.raises(AssertionError, match="survivors missed"):
        check_survivors(expected, kept, 2.0**-6, 8)


@given(st.integers(1, 50), st.integers(1, 50), st.data())
def test_sizes_stay_in_range(edge, largest, data):
    assert 1 <= data.draw(sizes((edge,), largest)) <= largest


def test_poison_is_nan():
    for dtype in DTYPES:
        assert np.isnan(Poisoned(np).empty((2, 3), dtype).astype(np.float64)).all()
    assert (Poisoned(np).zeros(2) == 0).all()


def test_cases_cover_what_matters():
    """Among a few hundred draws: no tokens, one token, past a tile's edge, nothing valid, and every dtype."""
    edges = Edges(n=(4,), v=(8,), d=(4,), max_n=9, max_v=20, max_d=9)
    seen = set()

    @given(cases(edges))
    def collect(case):
        seen.add(("N", case.targets.size))
        seen.add(("V", len(case.c)))
        seen.add(("dtype", str(case.e.dtype)))
        seen.add(("bias", "bias" in case.options))
        seen.add(("shift", int(case.options["shift"])))
        seen.add(("none valid", bool((case.targets == case.options["ignore_index"]).all())))

    collect()
    assert {("N", 0), ("N", 1), ("V", 1), ("none valid", True), ("none valid", False), ("bias", True)} <= seen
    assert {("dtype", str(dtype)) for dtype in DTYPES} <= seen
    assert {("shift", 0), ("shift", 1), ("shift", 2)} <= seen
