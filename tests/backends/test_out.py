"""Gradients written into the caller's arrays, and added to what is in there: the same numbers, nothing else touched."""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cce_numba as cce
from tests.helpers.cases import DTYPES, Case, cases, filters, make_case
from tests.helpers.checks import assert_within, expect, gradient_tolerances, rounded

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

NAMES = ("e", "c", "bias")
BFLOAT16 = DTYPES[1]


def each(gradients):
    """(name, array) of those that are there."""
    return [(name, getattr(gradients, name)) for name in NAMES if getattr(gradients, name) is not None]


def filled(harness, like, fill):
    """Arrays on the backend's device, like those of `like` (NumPy), with `fill(name, array)` in them."""
    return cce.Gradients(
        **{name: harness.device(np.asarray(fill(name, x), x.dtype).reshape(x.shape)) for name, x in each(like)}
    )


def garbage(name, array):
    return np.full(array.nbytes, 0xFF, np.uint8).view(array.dtype)  # NaN


def on_host(harness, gradients):
    return cce.Gradients(**{name: harness.host(x) for name, x in each(gradients)})


def assert_same(actual, expected):
    assert [name for name, _ in each(actual)] == [name for name, _ in each(expected)]
    for name, array in each(expected):
        assert getattr(actual, name).dtype == array.dtype
        np.testing.assert_array_equal(getattr(actual, name), array, err_msg=name)


def without_subnormals(gradients):
    """Zeros for them, which additions on a device may make of them, too."""
    smallest = {name: x.dtype.type(ml_dtypes.finfo(x.dtype).smallest_normal) for name, x in each(gradients)}
    return cce.Gradients(**{name: np.where(abs(x) < smallest[name], x.dtype.type(0), x) for name, x in each(gradients)})


def assert_sum(case, actual, old, added):
    """actual = old + added, with one rounding more than `added` has, and sums in another order."""
    tolerances = dict(zip(NAMES, gradient_tolerances(expect(case), None, None, None, None), strict=True))
    for name, array in each(actual):
        before, plus = (getattr(x, name).astype(np.float64) for x in (old, added))
        unit = float(ml_dtypes.finfo(array.dtype).eps)
        tolerance = 2 * tolerances[name] + 2 * unit * (np.abs(before) + np.abs(plus))
        assert_within(f"out.{name}", array, before + plus, rounded(tolerance, before + plus, array.dtype))


@given(data=st.data())
def test_written_accumulated_and_accumulated_again(harness, edges, data):
    case = data.draw(cases(edges))
    case = case.with_options(**data.draw(filters()))
    result = harness.forward(case)
    plain = harness.backward(result)
    out = filled(harness, plain, garbage)
    returned = cce.backward(result, out=out)
    assert all(getattr(returned, name) is array for name, array in each(out))
    assert_same(on_host(harness, out), plain)
    rng = np.random.default_rng(1)
    old = filled(harness, plain, lambda name, x: rng.normal(size=x.shape))
    before = {name: harness.host(x).copy() for name, x in each(old)}
    cce.backward(result, out=old, accumulate=True)
    assert_sum(case, on_host(harness, old), cce.Gradients(**before), plain)
    again = filled(harness, plain, lambda name, x: np.zeros(x.shape))
    cce.backward(result, out=again, accumulate=True)
    assert_same(without_subnormals(on_host(harness, again)), without_subnormals(plain))
    cce.backward(result, out=again, accumulate=True)
    assert_sum(case, on_host(harness, again), plain, plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_call(harness, edges, dtype):
    harness.skip_unless_it_takes(dtype)
    case = make_case(1, (2, edges.n[-1]), edges.v[-1] + 3, edges.d[-1] + 1, dtype, ignored=0.2, bias=True, softcap=9.0)
    arrays, options = harness._arrays(case), harness._options(case)
    loss, plain = cce.linear_cross_entropy_with_grad(*arrays, **options)
    plain = on_host(harness, plain)
    out = filled(harness, plain, garbage)
    other_loss, grads = cce.linear_cross_entropy_with_grad(*arrays, out=out, **options)
    assert harness.host(loss) == harness.host(other_loss)
    assert all(getattr(grads, name) is getattr(out, name) for name in NAMES)
    assert_same(on_host(harness, out), plain)
    cce.linear_cross_entropy_with_grad(*arrays, out=out, accumulate=True, **options)
    assert_sum(case, on_host(harness, out), plain, plain)


def test_a_long_vocabulary(harness, edges):
    """Many chunks: what was there is counted once, whether the sum begins with it or ends with it."""
    for dtype in (edges.dtype, BFLOAT16):
        case = make_case(2, (edges.n[-1] + 1,), edges.long_v, edges.d[-1], dtype, bias=True, reduction="sum", filter_eps=None)
        result = harness.forward(case)
        plain = harness.backward(result)
        old = filled(harness, plain, lambda name, x: np.arange(x.size) % 7 - 3.0)
        before = cce.Gradients(**{name: harness.host(x).copy() for name, x in each(old)})
        cce.backward(result, out=old, accumulate=True)
        assert_sum(case, on_host(harness, old), before, plain)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("filter_eps", ["auto", None])
def test_float32_arrays_for_16_bit_inputs(harness, edges, dtype, filter_eps):
    case = make_case(3, (edges.n[-1] + 1,), edges.v[-1] + 9, edges.d[-1] + 1, dtype, bias=True, filter_eps=filter_eps)
    result = harness.forward(case)
    narrow = harness.backward(result)
    wide = harness.backward(harness.forward(case.with_options(accum_e_fp32=True, accum_c_fp32=True)))
    wide = dataclasses.replace(wide, bias=wide.bias.astype(np.float32))
    out = filled(harness, wide, garbage)
    cce.backward(result, out=out)
    written = on_host(harness, out)
    np.testing.assert_array_equal(written.e, wide.e)
    np.testing.assert_array_equal(written.c, wide.c)
    np.testing.assert_array_equal(written.bias.astype(dtype), narrow.bias)
    assert (written.bias != narrow.bias.astype(np.float32)).any()
    before = cce.Gradients(**{name: x.copy() for name, x in each(written)})
    cce.backward(result, out=out, accumulate=True)
    assert_sum(case, on_host(harness, out), before, before)


def test_a_16_bit_sum_is_rounded_once(harness, edges):
    """Parts that are each less than half a unit of what is there would vanish one by one; together they count."""
    case = make_case(4, (edges.n[-1] * 2,), edges.long_v, edges.d[-1], BFLOAT16, reduction="sum", filter_eps=None)
    case.c[...] = np.asarray(-1, BFLOAT16)
    case.targets[:] = 0
    case.c[0] = 1
    # Logits are below 1 in size, so dE is nearly -2 everywhere, its part of any chunk less.
    case.e[...] = np.asarray(2.0 ** -np.ceil(np.log2(edges.d[-1])), BFLOAT16)
    result = harness.forward(case)
    exact = harness.backward(harness.forward(case.with_options(accum_e_fp32=True, accum_c_fp32=True)))
    old = 512.0  # its spacing below is 2
    out = filled(harness, harness.backward(result), lambda name, x: np.full(x.shape, old))
    cce.backward(result, out=out, accumulate=True)
    written = on_host(harness, out)
    np.testing.assert_array_equal(written.e, (old + exact.e).astype(BFLOAT16))
    np.testing.assert_array_equal(written.c, (old + exact.c).astype(BFLOAT16))
    assert (written.e.astype(np.float32) < old).all()


def test_only_some_are_given(harness, edges):
    case = make_case(5, (edges.n[-1] + 1,), edges.v[-1] + 1, edges.d[-1], edges.dtype, bias=True)
    result = harness.forward(case)
    plain = harness.backward(result)
    for name, array in each(plain):
        alone = filled(harness, cce.Gradients(**{name: array}), garbage)
        assert_same(harness.backward(result, out=alone), plain)
        only = filled(harness, cce.Gradients(**{name: array}), garbage)
        assert_same(harness.backward(result, wrt=name, out=only), cce.Gradients(**{name: array}))
        cce.backward(result, wrt=name, out=only, accumulate=True)
        np.testing.assert_allclose(
            harness.host(getattr(only, name)).astype(np.float64), 2 * array.astype(np.float64), rtol=0.01, atol=1e-5
        )


def layouts(array, on_device):
    """Names, parents and views of the array's shape; on a device the last dimension is contiguous."""
    if array.ndim == 1:
        return (
            {} if on_device else {"apart": ((len(array), 3), lambda x: x[:, 1]), "reversed": (array.shape, lambda x: x[::-1])}
        )
    lead, D = array.shape[:-1], array.shape[-1]
    rows = {
        "rows apart": ((*lead[:-1], 2 * lead[-1], D), lambda x: x[..., ::2, :]),
        "longer rows": ((*lead, D + 3), lambda x: x[..., 1 : D + 1]),
        "last row first": (array.shape, lambda x: x[::-1] if x.ndim == 2 else x[::-1, ::-1]),
    }
    if on_device:
        return rows
    return rows | {
        "columns apart": ((*lead, 2 * D), lambda x: x[..., ::2]),
        "reversed": (array.shape, lambda x: x[::-1, ::-1] if x.ndim == 2 else x[::-1, ::-1, ::-1]),
        "transposed": ((D, *lead), lambda x: np.moveaxis(x, 0, -1)),
    }


@pytest.mark.parametrize("dtype", DTYPES[1:3], ids=str)
@pytest.mark.parametrize("of", NAMES)
def test_strided_arrays(harness, edges, of, dtype):
    """Of leading dimensions, too; and what lies between the elements is not touched."""
    harness.skip_unless_it_takes(dtype)
    case = make_case(6, (2, edges.n[-1]), edges.v[-1] + 1, edges.d[-1] + 1, dtype, ignored=0.2, bias=True)
    result = harness.forward(case)
    plain = harness.backward(result)
    expected = getattr(plain, of)
    on_device = not isinstance(harness.device(case.e), np.ndarray)
    for layout, (shape, view) in layouts(expected, on_device).items():
        parent = harness.device(np.full(shape, 3, dtype))
        array = view(parent)
        assert array.shape == expected.shape
        cce.backward(result, wrt=of, out=cce.Gradients(**{of: array}))
        np.testing.assert_array_equal(harness.host(array), expected, err_msg=layout)
        touched = harness.host(parent).copy()
        view(touched)[...] = 3
        assert (touched == np.asarray(3, dtype)).all(), layout
        cce.backward(result, wrt=of, out=cce.Gradients(**{of: array}), accumulate=True)
        twice = cce.Gradients(**{of: expected})
        assert_sum(case, cce.Gradients(**{of: harness.host(array)}), twice, twice)


@pytest.mark.parametrize("dtype", DTYPES[1:3], ids=str)
def test_ignored_and_silent_tokens_keep_or_lose_what_was_there(harness, edges, dtype):
    """NaN in their e, and even in what their row of dE held, is no reason to touch anything else."""
    harness.skip_unless_it_takes(dtype)
    case = make_case(7, (edges.n[-1] + 2,), edges.v[-1] + 2, edges.d[-1], dtype, ignored=0.3, reduction="none")
    idle = case.targets == -100
    silent = np.flatnonzero(~idle)[::3]
    d_loss = np.ones(len(idle), np.float32)
    d_loss[silent] = 0
    idle[silent] = True
    e = case.e.copy()
    e[idle] = np.nan
    result = harness.forward(Case(e, case.c, case.targets, case.options))
    plain = harness.backward(result, d_loss)
    upstream = harness.device(d_loss)
    old = np.full(plain.e.shape, 5, dtype)
    out = cce.Gradients(e=harness.device(old))
    cce.backward(result, upstream, wrt="e", out=out, accumulate=True)
    kept = harness.host(out.e)
    assert (kept[idle] == old[idle]).all()
    assert_within("dE", kept[~idle], 5 + plain.e[~idle].astype(np.float64), 0.05 if dtype == BFLOAT16 else 1e-5)
    out = cce.Gradients(e=harness.device(np.full(plain.e.shape, np.nan, dtype)))
    cce.backward(result, upstream, wrt="e", out=out)
    assert (harness.host(out.e)[idle] == 0).all()
    np.testing.assert_array_equal(harness.host(out.e), plain.e)


def test_nothing_to_learn_from(harness, edges):
    for shape, ignored in (((0,), 0.0), ((3, 0), 0.0), ((edges.n[-1] + 1,), 1.0)):
        case = make_case(8, shape, edges.v[-1] + 1, edges.d[-1], edges.dtype, bias=True, ignored=ignored)
        result = harness.forward(case)
        plain = harness.backward(result)
        out = filled(harness, plain, lambda name, x: np.full(x.shape, 2.0))
        cce.backward(result, out=out, accumulate=True)
        assert all((x == 2).all() for _, x in each(on_host(harness, out)))
        cce.backward(result, out=out)
        assert_same(on_host(harness, out), plain)


def test_a_lost_token_shows_in_the_sum(harness, edges):
    case = make_case(9, (edges.n[-1] + 1,), edges.v[-1] + 2, edges.d[-1], edges.dtype, bias=True)
    case.e[1, 0] = np.nan
    result = harness.forward(case)
    out = filled(harness, harness.backward(result), lambda name, x: np.ones(x.shape))
    cce.backward(result, out=out, accumulate=True)
    written = on_host(harness, out)
    assert np.isnan(written.e[1]).all()
    assert np.isfinite(written.e[2:]).all()
    assert np.isnan(written.c).any(axis=1).all()
    assert np.isnan(written.bias).all()
