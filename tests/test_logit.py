"""The rule for a logit: a number, an array, and any kind of kernel have the same; what is None costs a kernel nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numba import njit

from cce_numba import logit
from cce_numba.launch import inlined
from tests.helpers import offline
from tests.helpers.harness import SimulatorHarness


@st.composite
def problems(draw):
    """`(products, bias, scale, softcap)`; the last three may be None."""
    dtype = np.dtype(draw(st.sampled_from([np.float32, np.float64])))
    shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 5)))
    numbers = st.floats(-50, 50, width=32)
    products = draw(hnp.arrays(dtype, shape, elements=numbers))
    bias = draw(
        st.none() | hnp.arrays(st.sampled_from([dtype, np.dtype(np.float16)]), shape[1:], elements=st.floats(-8, 8, width=16))
    )
    scale = draw(st.none() | hnp.arrays(dtype, (shape[0], 1), elements=st.floats(0.125, 4, width=32)))
    return products, bias, scale, draw(st.none() | st.sampled_from([0.5, 30.0]))


@given(problem=problems())
@example(problem=(np.array([[2.0**-126]], np.float32), None, np.array([[0.125]], np.float32), 30.0))
def test_arrays_and_numbers_have_the_same(problem):
    products, bias, scale, softcap = problem
    arrays, dtype = products.copy(), products.dtype
    logit.finish_in_place(arrays, bias, scale, softcap)
    assert arrays.dtype == dtype
    # A quotient too small for a normal number is rounded to a multiple of the smallest, and then multiplied by the softcap.
    underflow = 2 * float(np.finfo(dtype).smallest_subnormal) * max(1.0, softcap or 0.0)
    for (n, v), product in np.ndenumerate(products):
        of_bias = None if bias is None else dtype.type(bias[v])
        of_scale, of_softcap = None if scale is None else scale[n, 0], None if softcap is None else dtype.type(softcap)
        one = logit.finish(product, of_bias, of_scale, of_softcap)
        np.testing.assert_allclose(arrays[n, v], one, rtol=4 * np.finfo(dtype).eps, atol=underflow)
        exact = np.float64(product) + (0 if bias is None else np.float64(bias[v]))
        exact *= 1 if scale is None else np.float64(scale[n, 0])
        exact = exact if softcap is None else softcap * np.tanh(exact / softcap)
        magnitude = (abs(product) + abs(bias[v] if bias is not None else 0)) * (1 if scale is None else scale[n, 0])
        np.testing.assert_allclose(one, exact, atol=8 * np.finfo(dtype).eps * (magnitude + abs(exact)) + underflow)


def test_the_slope_is_that_of_the_cap():
    for dtype in (np.float32, np.float64):
        x, softcap, h = np.linspace(-8, 8, 33), 3.0, 1e-6
        capped = [logit.finish(dtype(one), None, None, dtype(softcap)) for one in x]
        slopes = np.array([logit.slope_of_cap(one / dtype(softcap)) for one in capped])
        assert slopes.dtype == dtype
        measured = (softcap * np.tanh((x + h) / softcap) - softcap * np.tanh((x - h) / softcap)) / (2 * h)
        np.testing.assert_allclose(slopes, measured, atol=1e-6)


def test_compiled_for_the_cpu_it_keeps_the_dtype():
    @njit
    def both(z, softcap):
        return inlined.finish(z, None, z, softcap), inlined.slope_of_cap(z)

    @njit
    def bare(z):
        return inlined.finish(z, None, None, None)

    for dtype in (np.float32, np.float64):
        finished, slope = both(dtype(0.5), dtype(2))
        np.testing.assert_allclose(finished, 2 * np.tanh(0.125), rtol=1e-6)
        assert slope == 0.75
        assert bare(dtype(0.5)) == 0.5
        assert both.overloads[both.signatures[-1]].signature.return_type.dtype.name == np.dtype(dtype).name


@pytest.mark.skipif(SimulatorHarness.is_active(), reason="the simulator compiles nothing")
@pytest.mark.usefixtures("compiler")
def test_compiled_for_a_gpu_what_is_none_is_not_there():
    from numba.cuda import types

    array = types.Array(types.float32, 1, "C")

    def with_all(x, out):
        out[0] = inlined.finish(x[0], x[1], x[2], x[3]) * inlined.slope_of_cap(x[4])

    def with_none(x, out):
        out[0] = inlined.finish(x[0], None, None, None)

    def with_scale(x, out):
        out[0] = inlined.finish(x[0], None, x[2], None)

    everything, nothing, scaled = (
        offline.compile_function(kernel, types.void(array, array)) for kernel in (with_all, with_none, with_scale)
    )
    assert nothing.count(r"ld\.global\.f32") == 1
    assert nothing.count(r"\S+\.f32") == 2, "it is read and written"
    assert scaled.count(r"mul\S*\.f32") == 1
    assert everything.count(r"ld\.global\.f32") == 5
    for compiled in (everything, nothing, scaled):
        assert compiled.count(r"call(\.uni)?") == 0
        assert compiled.count(r"\S+\.f64") == 0, "no number becomes wider"
