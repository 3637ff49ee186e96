"""The way through a call, with a backend that is watched: what it is asked for, what it is given, and what comes of it.

Numbers are judged in `tests/backends`; here float64 problems show that each path puts the pieces together in the right way.
"""

from __future__ import annotations

import dataclasses
import itertools
from types import SimpleNamespace

import numpy as np
import pytest

import cce_numba as cce
import reference
from cce_numba import arguments, driver
from cce_numba import terms as terms_of_the_loss
from cce_numba.arguments import GRADIENTS, Rows
from cce_numba.backend import Gradients, Weights, backend_module
from cce_numba.destination import Destination
from tests.helpers.cases import DTYPES, make_case
from tests.helpers.ranks import on_ranks

V = 30
CASE = make_case(0, (3, 7), V, 5, np.dtype(np.float64), ignored=0.3, bias=True, filter_eps=None)
RNG = np.random.default_rng(1)
TERMS = {
    "nothing else": {},
    "z-loss and weights": {"z_loss": 0.1, "class_weights": RNG.uniform(0, 2, V), "token_weights": RNG.uniform(0, 2, (3, 7))},
    "scale": {"logit_scale": RNG.uniform(0.5, 2, (3, 7))},
    "smoothing": {"label_smoothing": 0.2, "logit_scale": 0.5},
    "smoothing, capped": {"label_smoothing": 0.2, "softcap": 4.0, "class_weights": RNG.uniform(0, 2, V)},
}
ARRAYS = (CASE.e, CASE.c, CASE.targets)


@pytest.fixture
def watched(monkeypatch):
    """What backends are asked and given: `forwards`, whether survivors were to be recorded; `backwards`, their arguments.

    Of `into`, which is written to, a copy is kept of what was there before.
    """
    seen = SimpleNamespace(forwards=[], backwards=[])

    def watched_module(name):
        module = backend_module(name)

        def forward(p, plan, *, record_survivors, keep_logits):
            seen.forwards.append(record_survivors)
            return module.forward(p, plan, record_survivors=record_survivors, keep_logits=keep_logits)

        def backward(p, plan, statistics, weights, into, adds):
            before = {name: getattr(into, name).copy() for name in GRADIENTS if getattr(into, name) is not None}
            seen.backwards.append(SimpleNamespace(p=p, statistics=statistics, weights=weights, before=before, adds=adds))
            module.backward(p, plan, statistics, weights, into, adds)

        return SimpleNamespace(**(vars(module) | {"forward": forward, "backward": backward}))

    monkeypatch.setattr(driver, "backend_module", watched_module)
    return seen


def options_of(terms, reduction="mean", **more):
    return CASE.options | TERMS[terms] | {"reduction": reduction, "backend": "cpu"} | more


def exact(terms, reduction, **upstream):
    """The loss and gradients of the reference."""
    options = {name: x for name, x in options_of(terms, reduction).items() if name not in ("backend", "filter", "filter_eps")}
    return reference.forward(*ARRAYS, **options).loss, reference.backward(*ARRAYS, **options, **upstream)


def filled(number, names=GRADIENTS):
    inputs = {"e": CASE.e, "c": CASE.c, "bias": CASE.options["bias"]}
    return Gradients(**{name: np.full_like(inputs[name], number) for name in names})


def assert_close(actual, expected, names=GRADIENTS, added_to=0.0):
    for name in GRADIENTS:
        if name in names:
            np.testing.assert_allclose(getattr(actual, name), getattr(expected, name) + added_to, rtol=1e-9, atol=1e-11)
        else:
            assert getattr(actual, name) is None


# ---- forward


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("terms", TERMS)
def test_the_loss_alone(watched, terms, reduction):
    loss, lse = cce.linear_cross_entropy(*ARRAYS, **options_of(terms, reduction), return_lse=True)
    np.testing.assert_allclose(loss, exact(terms, reduction)[0], rtol=1e-10)
    assert lse.shape == CASE.targets.shape
    assert watched.forwards == [False]
    assert not watched.backwards


@pytest.mark.parametrize("wrt", ["e", "c", "bias", ("e", "bias"), ()], ids=str)
@pytest.mark.parametrize("filters", [("e", "c"), ("e",), ("c",), ()], ids=str)
def test_survivors_are_recorded_where_a_gradient_that_is_asked_for_is_filtered(watched, filters, wrt):
    """The public functions ask for all: what a backward will want is not known, or shall not change the loss."""
    options = options_of("nothing else", filter_eps=0.1, filter_e_grad="e" in filters, filter_c_grad="c" in filters)
    with driver.prepared(*ARRAYS, options) as (problem, plan):
        driver.forward(problem, plan, wrt)
    asked = (wrt,) if isinstance(wrt, str) else wrt
    assert watched.forwards == [bool({"c" if name == "bias" else name for name in asked} & set(filters))]
    cce.linear_cross_entropy_with_grad(*ARRAYS, wrt=wrt, **options)
    cce.forward(*ARRAYS, **options)
    assert watched.forwards[1:] == [bool(filters)] * 2


def test_the_building_blocks_take_the_same_way(watched):
    lse = cce.linear_logsumexp(CASE.e, CASE.c, backend="cpu")
    np.testing.assert_allclose(lse, reference.logsumexp(CASE.e @ CASE.c.T))
    assert watched.forwards == [False]
    dots = cce.indexed_dot(*ARRAYS, backend="cpu")
    np.testing.assert_allclose(dots, reference.forward(*ARRAYS).target_logit, rtol=1e-10)
    assert len(watched.forwards) == 1


def test_a_shard_needs_to_be_told_of_the_others(watched):
    with driver.prepared(*ARRAYS, {}, rows=Rows(0, V + 1)) as (problem, plan):  # noqa: SIM117
        with pytest.raises(AssertionError, match="who has a shard alone has a partial, and no loss"):
            driver.forward(problem, plan)


def test_terms_and_backward_see_what_was_merged(watched, monkeypatch):
    """So one line is enough to make partial results whole."""
    merged = driver.merged

    def raised(p, own, every):
        """As if another rank had found logits that are larger by 1."""
        found = merged(p, own, every)
        return dataclasses.replace(found, lse=found.lse + 1, max_logit=found.max_logit + 1)

    monkeypatch.setattr(driver, "merged", raised)
    options = options_of("nothing else", "none")
    loss, _ = on_ranks(1, lambda one: cce.linear_cross_entropy_with_grad(*ARRAYS, communicator=one, **options))[0]
    counts = CASE.targets != -100
    np.testing.assert_allclose(loss[counts], exact("nothing else", "none")[0][counts] + 1)
    np.testing.assert_allclose(watched.backwards[0].statistics.lse.reshape(3, 7)[counts], reference.forward(
        *ARRAYS, bias=CASE.options["bias"]).lse[counts] + 1)  # fmt: skip


# ---- backward


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("terms", TERMS)
def test_loss_and_gradients(watched, terms, reduction):
    loss, grads = cce.linear_cross_entropy_with_grad(*ARRAYS, **options_of(terms, reduction))
    expected_loss, expected = exact(terms, reduction)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-10)
    assert_close(grads, expected)
    assert len(watched.forwards) == len(watched.backwards) == 1


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("terms", TERMS)
def test_any_upstream_gradient(terms, reduction):
    d_loss = np.linspace(-1, 2, 21).reshape(3, 7) if reduction == "none" else -0.5
    d_lse = np.linspace(1, -1, 21).reshape(3, 7)
    result = cce.forward(*ARRAYS, **options_of(terms, reduction))
    grads = cce.backward(result, d_loss, d_lse)
    assert_close(grads, exact(terms, reduction, d_loss=d_loss, d_lse=d_lse)[1])
    only_lse = cce.backward(result, 0.0, d_lse)
    assert_close(only_lse, exact(terms, reduction, d_loss=0.0, d_lse=d_lse)[1])


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("terms", TERMS)
def test_in_one_call_or_in_two(terms, reduction):
    options = options_of(terms, reduction)
    result = cce.forward(*ARRAYS, **options)
    loss, grads = cce.linear_cross_entropy_with_grad(*ARRAYS, **options)
    np.testing.assert_array_equal(result.loss, loss)
    for _ in range(2):
        apart = cce.backward(result)
        assert all((getattr(apart, name) == getattr(grads, name)).all() for name in GRADIENTS)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("terms", TERMS)
def test_given_arrays(watched, terms, accumulate):
    """What is there may be NaN, unless it is added to; who writes the zeros is what `Backend.backward` says."""
    out = filled(3.0 if accumulate else np.nan)
    _, grads = cce.linear_cross_entropy_with_grad(*ARRAYS, out=out, accumulate=accumulate, **options_of(terms))
    assert all(getattr(grads, name) is getattr(out, name) for name in GRADIENTS)
    assert_close(out, exact(terms, "mean")[1], added_to=3.0 if accumulate else 0.0)
    (call,) = watched.backwards
    assert call.adds == accumulate
    if accumulate:
        assert all((x == 3).all() for x in call.before.values())
    else:
        assert not call.before["e"].any()
        assert np.isnan(call.before["c"]).all()
        assert np.isnan(call.before["bias"]).all()


@pytest.mark.parametrize("wrt", [names for n in range(4) for names in itertools.combinations(GRADIENTS, n)], ids=str)
@pytest.mark.parametrize("terms", TERMS)
def test_frozen_parts(watched, terms, wrt):
    _, grads = cce.linear_cross_entropy_with_grad(*ARRAYS, wrt=wrt, **options_of(terms))
    assert_close(grads, exact(terms, "mean")[1], names=wrt)
    assert set(watched.backwards[0].before) == set(wrt)


@pytest.mark.parametrize("terms", TERMS)
def test_weights_of_tokens(watched, terms):
    """They say what G is, all of it."""
    cce.linear_cross_entropy_with_grad(*ARRAYS, **options_of(terms))
    (call,) = watched.backwards
    weights, p, lse = call.weights, call.p, call.statistics.lse
    assert (weights.uniform is not None) == (terms == "smoothing, capped")
    scale = np.ones(p.N) if p.logit_scale is None else p.logit_scale
    z = (p.e @ p.c.T + p.bias) * scale[:, None]
    slope = np.ones_like(z)
    if p.options.softcap is not None:
        z = p.options.softcap * np.tanh(z / p.options.softcap)
        slope = 1 - (z / p.options.softcap) ** 2
    g = weights.softmax[:, None] * np.exp(z - lse[:, None]) - weights.target[:, None] * (p.targets[:, None] == np.arange(V))
    assert (weights.outer is not None) == (terms == "smoothing")
    if weights.outer is not None:  # the rest of it is of rank one
        uniform = scale[:, None] * np.where(p.targets == -100, 0, 0.2 / (p.targets != -100).sum() / V)[:, None]
        g -= uniform
        rest = {"e": uniform * p.c.sum(axis=0), "c": (uniform * p.e).sum(axis=0)[None, :], "bias": uniform.sum()[None, None]}
        for name, expected in rest.items():
            made = terms_of_the_loss.outer_product(getattr(weights.outer, name), slice(None))
            np.testing.assert_allclose(-np.broadcast_to(made, expected.shape), expected, rtol=1e-9, atol=1e-11)
    if weights.uniform is not None:
        g -= weights.uniform[:, None] * p.class_weights
    g = np.where((p.targets == -100)[:, None], 0, g * slope)
    expected = exact(terms, "mean")[1]
    np.testing.assert_allclose(g @ p.c, expected.e.reshape(-1, 5), rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(g.T @ p.e, expected.c, rtol=1e-9, atol=1e-11)
    counting = np.flatnonzero(p.targets != -100)
    np.testing.assert_array_equal(weights.taking_part(counting), counting)


def test_a_token_takes_part_by_any_of_its_weights():
    softmax, target, uniform = np.eye(4)[:3]
    assert Weights(softmax, target, uniform).taking_part(np.arange(4)).tolist() == [0, 1, 2]
    assert Weights(softmax, target).taking_part(np.array([3, 1])).tolist() == [1]
    assert Weights(softmax, target, entropy=uniform).taking_part(np.arange(4)).tolist() == [0, 1, 2]
    assert Weights(softmax, np.stack([target, uniform], axis=1)).taking_part(np.arange(4)).tolist() == [0, 1, 2]


@pytest.mark.parametrize("terms", ["nothing else", "smoothing", "smoothing, capped"])
@pytest.mark.parametrize("accumulate", [False, True])
def test_no_tokens(watched, terms, accumulate):
    """Then no backend is asked to go back, and the zeros are the driver's."""
    out = filled(3.0 if accumulate else np.nan)
    out = dataclasses.replace(out, e=np.empty((0, 5)))
    options = options_of(terms)
    cce.linear_cross_entropy_with_grad(CASE.e[0, :0], CASE.c, CASE.targets[0, :0], out=out, accumulate=accumulate, **options)
    assert not watched.backwards
    assert (out.c == (3 if accumulate else 0)).all()
    assert (out.bias == (3 if accumulate else 0)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_of_every_dtype_and_stride(watched, dtype):
    """Where no token takes part the gradient is what the driver has written."""
    case = make_case(0, (6,), 9, 4, dtype)
    wide = np.full((12, 8), np.nan, dtype)
    cce.linear_cross_entropy_with_grad(
        case.e, case.c, np.full(6, -100), wrt="e", out=Gradients(e=wide[::-2, ::2]), backend="cpu"
    )
    assert not wide[::-2, ::2].astype(np.float32).any()
    assert np.isnan(wide.astype(np.float32)).sum() == wide.size - 24


def test_an_upstream_gradient_that_does_not_fit_writes_nothing(watched):
    with driver.prepared(*ARRAYS, options_of("smoothing")) as (problem, plan):
        out = filled(3.0)
        destination = Destination.of(out, False, arguments.wanted(None, problem), problem)
        done = driver.forward(problem, plan, destination.wanted)
        for named in ({"d_loss": np.ones(2), "d_lse": None}, {"d_loss": None, "d_lse": np.ones(2)}):
            with pytest.raises(ValueError, match="d_l"):
                done.backward(**named, destination=destination)
    assert all((getattr(out, name) == 3).all() for name in GRADIENTS)
    assert not watched.backwards


# ---- what is prepared


def test_a_backend_that_was_named_goes_before_the_usual_one():
    for given, usual, chosen in (({}, "cpu", "cpu"), ({"backend": "cpu"}, "hopper", "cpu"), ({}, None, "cpu")):
        with driver.prepared(*ARRAYS, given, backend=usual) as (_, plan):
            assert plan.backend == chosen
    with pytest.raises(ValueError, match="backend: must be one of"), driver.prepared(*ARRAYS, {"backend": ""}, backend="cpu"):
        pass


def test_inside_the_caller_s_device_and_stream_are_current(monkeypatch):
    from cce_numba.interchange import Kind

    events = []

    class Current:
        def __enter__(self):
            events.append("entered")

        def __exit__(self, *error):
            events.append("left")

    monkeypatch.setattr(Kind, "current", lambda self: Current())
    monkeypatch.setattr(arguments, "_targets", lambda *args: events.append("checked"))
    with driver.prepared(*ARRAYS, {"backend": "cpu"}):
        assert events == ["entered", "checked"]
    assert events == ["entered", "checked", "left"]
