"""NaN, inf and targets out of range: they show where they must, and nowhere else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.cases import DTYPES, Case, make_case
from tests.helpers.checks import assert_within, check_forward, check_gradients, expect

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.parametrize("filter_eps", ["auto", None])
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_a_poisoned_token_is_lost_and_the_others_are_not(harness, edges, dtype, poison, filter_eps):
    case = make_case(2, (edges.n[-1] + 1,), edges.v[-1] + 2, edges.d[-1] + 1, dtype, bias=True, reduction="none")
    case = case.with_options(filter_eps=filter_eps)
    lost = edges.n[-1] - 1
    e = case.e.copy()
    e[lost, 1] = poison
    clean, poisoned = case, Case(e, case.c, case.targets, case.options)
    before, after = (harness.numbers(harness.forward(x)) for x in (clean, poisoned))
    others = np.arange(len(e)) != lost
    assert np.isnan(after["nll"][lost])
    np.testing.assert_array_equal(after["nll"][others], before["nll"][others])
    grads, clean_grads = (harness.backward(harness.forward(x)) for x in (poisoned, clean))
    assert np.isnan(grads.e[lost].astype(np.float64)).all()
    # Other tokens of the lost one's block may now keep more columns than before, so filtered gradients may move a little.
    scale = np.abs(clean_grads.e.astype(np.float64)).max()
    tolerance = 2.0**-7 * scale if dtype != np.float32 else 1e-5 * scale
    assert_within("dE of others", grads.e[others], clean_grads.e[others].astype(np.float64), tolerance)
    assert np.isnan(grads.c.astype(np.float64)).any(axis=1).all(), "dC is silently finite somewhere"
    assert np.isnan(grads.bias.astype(np.float64)).all()


@pytest.mark.parametrize("filter_eps", [2.0**-4, "auto", None])
@pytest.mark.parametrize("poison", [np.nan, np.inf], ids=str)
def test_a_poisoned_last_row_of_the_classifier_is_not_found_too_late(harness, edges, poison, filter_eps):
    """A token that meets it is lost, so that even columns walked past before, and dropped, must get their NaN."""
    case = make_case(2, (1,), edges.max_v, edges.d[-1] + 1, edges.dtype, spread=6.0, bias=True, filter_eps=filter_eps)
    case.targets[0] = np.argmax(case.e @ case.c.T + case.options["bias"])  # before this, most others are dropped
    case.c[-1, 0] = poison
    if poison == np.inf:
        case.e[:, 0] = np.abs(case.e[:, 0])  # so that its logit is +inf for all
    numbers, grads = harness.numbers(harness.forward(case)), harness.backward(harness.forward(case))
    assert np.isnan(numbers["nll"]).all()
    for gradient in (grads.e, grads.c, grads.bias):
        assert np.isnan(gradient).all()


@pytest.mark.parametrize("target", [-1, 10**6, 2**40, -(2**62)])
def test_a_target_out_of_range_is_never_a_silent_number(harness, edges, target):
    case = make_case(3, (edges.n[-1] + 1,), edges.v[-1] + 2, edges.d[-1], edges.dtype, reduction="none", check_targets=False)
    case.targets[edges.n[-1] - 1] = target
    expected, result = expect(case), harness.forward(case)
    numbers = harness.numbers(result)
    check_forward(expected, numbers)
    assert np.isnan(numbers["loss"]).sum() == 1
    assert np.isfinite(numbers["lse"]).all()
    check_gradients(
        expected, harness.backward(result), harness.kept(result, case.c.shape[0]), coarse_eps=result.plan.coarse_eps
    )
    with pytest.raises(ValueError, match=r"targets: must lie in \[0, V\)"):
        harness.forward(case.with_options(check_targets=True))


@pytest.mark.parametrize("filter_eps", ["auto", None, 2.0**-4])
def test_ignored_tokens_may_hold_anything(harness, edges, filter_eps):
    """Padding is often garbage: NaN in the row of an ignored token, or of one without upstream gradient, reaches nothing."""
    case = make_case(4, (edges.n[-1] + 2,), edges.v[-1] + 2, edges.d[-1], edges.dtype, bias=True, ignored=0.3, reduction="none")
    case = case.with_options(filter_eps=filter_eps)
    ignored = case.targets == -100
    silent = np.flatnonzero(~ignored)[::3]
    d_loss = np.ones(len(ignored), np.float32)
    d_loss[silent] = 0
    e = case.e.copy()
    e[ignored] = np.nan
    e[silent] = np.inf
    result = harness.forward(Case(e, case.c, case.targets, case.options))
    grads = harness.backward(result, d_loss)
    assert np.isfinite(grads.e).all()
    assert np.isfinite(grads.c).all()
    assert np.isfinite(grads.bias).all()
    assert (grads.e[ignored] == 0).all()
    assert (grads.e[silent] == 0).all()
    assert np.abs(grads.c).max() > 1e-3
    clean = harness.backward(harness.forward(case), d_loss)
    assert_within("dC", grads.c, clean.c.astype(np.float64), 1e-4 if filter_eps != 2.0**-4 else 0.3)


@pytest.mark.parametrize("filter_eps", ["auto", None])
def test_a_token_without_upstream_gradient_does_not_meet_a_poisoned_classifier(harness, edges, filter_eps):
    case = make_case(4, (6,), edges.v[-1] + 2, edges.d[-1], edges.dtype, reduction="none", filter_eps=filter_eps)
    case.c[1, 0] = np.nan
    grads = harness.backward(harness.forward(case), np.array([1, 0, 1, 0, 1, 0], np.float32))
    assert np.isnan(grads.e[::2]).any(axis=1).all()
    assert (grads.e[1::2] == 0).all()


@given(data=st.data())
def test_masked_vocabulary(harness, edges, data):
    """A bias of -inf removes entries of the vocabulary, whole tiles of them even, from loss and gradients."""
    V = data.draw(st.integers(2, edges.max_v), label="V")
    first = data.draw(st.integers(0, V - 1), label="first")
    last = data.draw(st.integers(first + 1, V), label="last")
    case = make_case(data.draw(st.integers(0, 99), label="seed"), (5,), V, edges.d[-1], edges.dtype, bias=True)
    case.options["bias"][first:last] = -np.inf
    if last - first < V:
        allowed = np.setdiff1d(np.arange(V), np.arange(first, last))
        case.targets[:] = allowed[case.targets % len(allowed)]
    expected, result = expect(case), harness.forward(case)
    numbers = harness.numbers(result)
    grads = harness.backward(result)
    if last - first == V:  # nothing is left: the log-sum-exp of nothing is -inf
        assert (numbers["lse"] == -np.inf).all()
        assert np.isnan(numbers["nll"]).all()
        assert np.isnan(grads.e).all()
    else:
        check_forward(expected, numbers)
        assert (grads.c[first:last] == 0).all()
        assert (grads.bias[first:last] == 0).all()
        check_gradients(expected, grads, harness.kept(result, V), coarse_eps=result.plan.coarse_eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_logits(harness, edges, dtype):
    """Logits of several hundred either way, targets that are nearly certain and nearly impossible."""
    case = make_case(6, (edges.n[-1] + 1,), edges.v[-1] + 1, edges.d[-1], dtype, spread=1.0, filter_eps=None)
    e = (case.e.astype(np.float64) * 200).astype(dtype)
    case = Case(e, case.c, case.targets, case.options)
    expected, result = expect(case), harness.forward(case)
    assert np.abs(expected.forward.logits).max() > 300
    check_forward(expected, harness.numbers(result))
    check_gradients(expected, harness.backward(result), None)


@pytest.mark.parametrize("filter_eps", ["auto", None])
def test_nothing_to_learn_from(harness, edges, filter_eps):
    """No tokens, or none that count: loss nan for mean and 0 for sum, gradients 0."""
    for shape, ignored in (((0,), 0.0), ((3, 0), 0.0), ((edges.n[-1] + 1,), 1.0)):
        case = make_case(7, shape, edges.v[-1] + 1, edges.d[-1], edges.dtype, bias=True, ignored=ignored, filter_eps=filter_eps)
        for reduction in ("mean", "sum", "none"):
            result = harness.forward(case.with_options(reduction=reduction))
            numbers, grads = harness.numbers(result), harness.backward(result)
            if reduction == "none":
                assert numbers["loss"].shape == shape
                assert (numbers["loss"] == 0).all()
            else:
                np.testing.assert_equal(float(numbers["loss"]), np.nan if reduction == "mean" else 0.0)
            assert int(numbers["n_valid"]) == 0
            assert grads.e.shape == case.e.shape
            assert not grads.e.any()
            assert not grads.c.any()
            assert not grads.bias.any()


def test_the_largest_float16_gradient_does_not_wrap(harness, edges):
    """An upstream gradient past float16's range gives inf, as rounding does, not a wrong finite number."""
    case = make_case(8, (3,), edges.v[-1], edges.d[-1], np.dtype(np.float16), reduction="sum")
    grads = harness.backward(harness.forward(case), d_loss=1e6)
    assert np.isinf(grads.c.astype(np.float32)).any()
