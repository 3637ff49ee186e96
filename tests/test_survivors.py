"""The filter's rule: its threshold misses nothing that it should keep; asking what it drops takes bounded memory."""

from __future__ import annotations

import math
import re
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numba import cuda, njit

import cce_numba as cce
from cce_numba.options import Options
from cce_numba.survivors import coarse_eps_of, log_threshold, make_threshold
from tests.helpers import offline
from tests.helpers.cases import DTYPES, make_case

REALS = (np.float32, np.float64)
numbers = st.floats(-3e4, 3e4)
thresholds = st.sampled_from([2.0**-4, 2.0**-16, 2.0**-19, 2.0**-61])


# ---- the threshold


@pytest.mark.parametrize("real", REALS)
@given(lse=numbers, below=st.floats(0, 50), eps=thresholds, above=st.floats(0, 3), error=st.floats(-1, 1), data=st.data())
def test_nothing_that_reaches_eps_is_missed(real, lse, below, eps, above, error, data):
    """Whatever lower bound it is compared with, and however the logit and the bound were rounded."""
    threshold = make_threshold(real)
    logit = lse + math.log(eps) + above
    rounded = real(logit + error * 1e-5 * (1 + abs(logit)))
    bound = lse - below
    bound += data.draw(st.floats(-1, 1), label="error of the bound") * 1e-5 * (1 + abs(bound))
    assert not (rounded < threshold(real(bound), real(log_threshold(eps))))


@pytest.mark.parametrize("real", REALS)
@given(bound=st.floats(-100, 100), eps=thresholds)
def test_little_more_is_kept_than_reaches_eps(real, bound, eps):
    """A logit of a hundredth less than log(eps) beyond an exact bound does not survive."""
    logit = real(bound + math.log(eps) - 0.01)
    assert logit < make_threshold(real)(real(bound), real(log_threshold(eps)))


@pytest.mark.parametrize("real", REALS)
@given(bounds=st.tuples(numbers, numbers), eps=thresholds)
def test_a_better_bound_keeps_no_more(real, bounds, eps):
    threshold, log_eps = make_threshold(real), real(log_threshold(eps))
    low, high = (threshold(real(bound), log_eps) for bound in sorted(bounds))
    assert low <= high


@pytest.mark.parametrize("real", REALS)
def test_what_is_lost_and_what_is_not_filtered_survives(real):
    threshold = make_threshold(real)
    with np.errstate(invalid="ignore"):
        for bound in (real(math.nan), real(math.inf)):
            assert not (real(0) < threshold(bound, real(log_threshold(0.5))))
    assert threshold(real(3), real(log_threshold(None))) == -math.inf
    assert type(threshold(real(3), real(-2))) is real


@pytest.mark.parametrize("real", REALS)
def test_it_compiles_for_the_cpu_and_gives_the_same_bits(real):
    plain = make_threshold(real)
    compiled = njit(plain)
    for bound in np.random.default_rng(0).normal(size=100).astype(real) * real(50):
        assert compiled(bound, real(-11.5)) == plain(bound, real(-11.5))


@pytest.mark.usefixtures("compiler")
def test_on_a_gpu_it_is_three_instructions_of_its_own_precision():
    threshold = cuda.jit(device=True, forceinline=True)(make_threshold(np.float32))

    def kernel(bound, log_eps, out):
        out[0] = threshold(bound, log_eps)

    floats = cuda.types.float32[::1]
    compiled = offline.compile_function(kernel, cuda.types.void(cuda.types.float32, cuda.types.float32, floats))
    assert compiled.count(r"call(\.uni)?") == 0
    assert not re.findall(r"\.f64", compiled.ptx)
    assert compiled.count(r"(fma\.rn|mul|add|sub|abs)\S*\.f32") <= 4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_second_threshold_is_higher_and_not_the_caller_s(dtype):
    options = Options.of(dtype, {})
    assert coarse_eps_of(options) == 4 * options.filter_eps
    for own in ({"filter_eps": options.filter_eps}, {"filter_eps": None}, {"filter_c_grad": False}):
        assert coarse_eps_of(Options.of(dtype, own)) is None
    assert coarse_eps_of(Options.of(dtype, {"filter_e_grad": False})) == 4 * options.filter_eps


# ---- the dropped mass


@pytest.mark.parametrize(("N", "V", "D"), [(4096, 20_000, 64), (300, 3000, 20_000)], ids=["long", "deep"])
def test_memory_is_bounded(N, V, D):
    case = make_case(0, (N,), V, D, DTYPES[2], spread=0.5)
    result = cce.forward(case.e, case.c, case.targets, backend="cpu", filter_eps=0.01)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        mass = result.dropped_mass()
        extra = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert extra <= 80 * 2**20
    assert np.median(mass) > 0
