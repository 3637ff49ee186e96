"""Every way that a logit can be infinite: what is finite, inf and NaN is so exactly where the reference has it."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import reference
from tests.helpers.cases import Case, make_case

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
TERMS = ("bias", "softcap", "logit_scale", "reduction", "label_smoothing", "z_loss", "class_weights", "token_weights")


@st.composite
def with_infinities(draw, edges):
    """A problem in which some logits are infinite: by a bias, a row of c or e, or a scale; at targets and elsewhere."""
    n, V, D = edges.n[1] + 1, edges.v[1] + 2, edges.d[-1]
    rng = np.random.default_rng(draw(st.integers(0, 2**16), label="seed"))
    case = make_case(int(rng.integers(2**16)), (n,), V, D, edges.dtype, bias=True, ignored=0.1)
    case.targets[0] = draw(st.sampled_from([0, V - 1]), label="target of the first token")
    e, c, bias, infinity = case.e, case.c, case.options["bias"], draw(st.sampled_from([-np.inf, np.inf]), label="infinity")
    options = {
        "softcap": draw(st.sampled_from([None, 3.0]), label="softcap"),
        "label_smoothing": draw(st.sampled_from([0.0, 0.1]), label="label_smoothing"),
        "z_loss": draw(st.sampled_from([0.0, 1e-3]), label="z_loss"),
        "filter_eps": draw(st.sampled_from([None, 2.0**-4]), label="filter_eps"),
        "reduction": draw(st.sampled_from(["sum", "none"]), label="reduction"),
    }
    if draw(st.booleans(), label="weights of tokens"):
        options["token_weights"] = (rng.random(n) < 0.7).astype(np.float32)
    if draw(st.booleans(), label="weights of classes"):
        options["class_weights"] = (rng.random(V) < 0.7).astype(np.float32)
    scale = rng.uniform(0.5, 2, n).astype(np.float32)
    by = draw(st.sampled_from(["bias", "most of bias", "c", "e", "scale"]), label="by")
    v = int(draw(st.sampled_from([case.targets[0], 1, V - 2]), label="entry"))
    if by == "bias":
        bias[v] = infinity
    elif by == "most of bias":
        bias[rng.random(V) < 0.8] = infinity
    elif by == "c":
        c[v, 0] = infinity
        e[:, 0] = np.abs(e[:, 0]) + 0.5  # the logits of all tokens have its sign
    elif by == "e":
        e[0, 0] = infinity
        if draw(st.booleans(), label="of one sign"):
            c[:, 0] = np.abs(c[:, 0]) + 0.5
    else:
        scale[0] = np.inf
    if by == "scale" or draw(st.booleans(), label="scaled"):
        options["logit_scale"] = scale
    return case.with_options(**options)


def assert_same(name, actual, exact, dtype, unfiltered=None):
    """The same numbers, and inf and NaN at the same places.

    unfiltered: what `exact` is with nothing dropped. An entry of G that is dropped may also count as 0. Where 0 meets an inf,
    the product is NaN, as it is without a filter.
    """
    actual = np.asarray(actual).astype(np.float64)
    if unfiltered is not None:
        exact = np.where(np.isnan(actual) & np.isnan(unfiltered), np.nan, exact)
    for kind in (np.isnan, np.isposinf, np.isneginf):
        np.testing.assert_array_equal(kind(actual), kind(exact), err_msg=f"{name}: {kind.__name__}")
    finite = np.isfinite(exact)
    tolerance = 64 * max(float(ml_dtypes.finfo(dtype).eps), 2.0**-20)
    largest = np.abs(exact[finite]).max(initial=0)
    np.testing.assert_allclose(actual[finite], exact[finite], rtol=tolerance, atol=tolerance * largest, err_msg=name)


@given(data=st.data())
def test_what_is_finite_is_so_where_the_reference_has_it(harness, edges, data):
    case: Case = data.draw(with_infinities(edges))
    options = {name: case.options[name] for name in TERMS if name in case.options}
    result = harness.forward(case)
    numbers, grads = harness.numbers(result), harness.backward(result)
    exact = reference.forward(case.e, case.c, case.targets, **options)
    for name in ("lse", "target_logit", "nll", "loss"):
        assert_same(name, numbers[name], np.asarray(getattr(exact, name)), np.float32)
    keep = None if case.options["filter_eps"] is None else harness.kept(result, len(case.c))
    filtered = reference.backward(case.e, case.c, case.targets, keep_e=keep, keep_c=keep, **options)
    unfiltered = reference.backward(case.e, case.c, case.targets, **options)
    for name in ("e", "c", "bias"):
        ours, wanted, without = (getattr(x, name) for x in (grads, filtered, unfiltered))
        assert_same(f"grads.{name}", ours, wanted, case.e.dtype, without)


def test_an_infinite_row_meets_entries_of_g_of_all_sizes(harness, edges):
    """Parts of a number, where a backend splits it, have either sign; G's come from scales that are no short fractions."""
    n = 4 * edges.n[1] + 1
    case = make_case(2, (n,), edges.v[1] + 2, edges.d[-1], edges.dtype, reduction="sum", filter_eps=None)
    case.targets[:] = 0
    case.c[0, 0], case.e[:, 0] = -np.inf, 1
    case = case.with_options(logit_scale=np.random.default_rng(3).uniform(0.5, 2, n).astype(np.float32))
    assert np.isposinf(harness.backward(harness.forward(case)).e[:, 0].astype(np.float64)).all()


@pytest.mark.parametrize("filter_eps", [None, 2.0**-4])
def test_a_lost_token_that_only_the_z_loss_reaches_is_lost(harness, edges, filter_eps):
    """Its target's class weighs nothing, so that no other weight makes it take part."""
    case = make_case(1, (4,), edges.v[1] + 2, edges.d[-1], edges.dtype, bias=True, reduction="sum", filter_eps=filter_eps)
    case.targets[:] = [0, 1, 1, 1]
    class_weights = np.ones(len(case.c), np.float32)
    class_weights[0] = 0
    case.e[0] = np.inf
    grads = harness.backward(harness.forward(case.with_options(z_loss=1e-3, class_weights=class_weights)))
    assert np.isnan(grads.e[0].astype(np.float64)).all()
    assert np.isfinite(grads.e[1:].astype(np.float64)).all()
    assert np.isnan(grads.bias.astype(np.float64)).all()


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_a_masked_entry_whose_class_weighs_nothing_is_not_smoothed(harness, edges, softcap):
    case = make_case(1, (4,), edges.v[1] + 2, edges.d[-1], edges.dtype, bias=True, softcap=softcap)
    case.targets[:] = 0
    class_weights = np.ones(len(case.c), np.float32)
    class_weights[1] = 0
    case.e[:, 0] = 1
    case.c[1, 0] = -np.inf
    numbers = harness.numbers(harness.forward(case.with_options(label_smoothing=0.1, class_weights=class_weights)))
    assert np.isfinite(numbers["loss"])
