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
import reference
from cce_numba.options import Options
from cce_numba.survivors import (
    coarse_eps_of,
    draw_seed,
    draws,
    log_threshold,
    low_word,
    make_draw,
    make_mix,
    make_scale,
    make_threshold,
)
from tests.helpers import offline
from tests.helpers.cases import DROPPING, DTYPES, make_case

REALS = (np.float32, np.float64)
MIX, DRAW = njit(make_mix(np.uint32)), njit(make_draw(np.uint32))
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
    options = Options.of(dtype, DROPPING)
    assert coarse_eps_of(options) == 4 * options.filter_eps
    for own in ({"filter_eps": options.filter_eps}, {"filter_eps": None}, {"filter_c_grad": False}, {"filter": "unbiased"}):
        assert coarse_eps_of(Options.of(dtype, DROPPING | own)) is None
    assert coarse_eps_of(Options.of(dtype, DROPPING | {"filter_e_grad": False})) == 4 * options.filter_eps


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


# ---- draws


WORDS = st.integers(0, 2**32 - 1)


@given(block=st.integers(0, 2**20), v=st.integers(0, 2**31 - 1), seed=WORDS)
def test_compiled_draws_have_the_bits_of_plain_ones_and_of_the_reference(block, v, seed):
    """With 32-bit integers, as kernels have them, and with Python's; and all of an array at once."""
    u = float(make_draw(low_word)(block, make_mix(low_word)(v ^ seed)))
    assert u == DRAW(block, MIX(v ^ seed)) == draws(np.array([block]), np.array([v]), seed)[0]
    assert 0 < u < 1


def test_draws_and_seeds_are_the_reference_s():
    targets = np.random.default_rng(0).integers(-5, 10**6, 200)
    for filter_seed in (0, 7):
        seed = draw_seed(targets, filter_seed)
        assert seed == reference.draw_seed(targets, filter_seed)
        ours = draws(np.arange(9)[:, None], np.arange(300), seed)
        assert np.array_equal(ours, reference.draws(9, 300, int(seed)))
        assert ours.dtype == np.float32


def test_draws_of_a_shard_are_those_of_its_entries_in_the_whole_vocabulary():
    seed, blocks = draw_seed(np.arange(50), 3), np.arange(5)[:, None]
    for start in (1, 8, 2**31 - 300):
        ours = draws(blocks, np.arange(300), seed + (start << 32))
        np.testing.assert_array_equal(ours, draws(blocks, np.arange(start, start + 300), seed))
        assert (ours != draws(blocks, np.arange(300), seed)).mean() > 0.9


@pytest.mark.parametrize("real", REALS)
@given(q=st.floats(0, 2), eps=thresholds, u=st.floats(2.0**-24, 1 - 2.0**-24))
def test_what_survives_by_chance_is_multiplied(real, q, eps, u):
    scale = make_scale(real)(real(q * eps), real(eps), real(u))
    assert type(scale) is real
    if q >= 1 + 1e-6:
        assert scale == 1
    elif q < u * (1 - 1e-6):
        assert scale == 0
    elif u * (1 + 1e-6) < q < 1 - 1e-6:
        assert abs(scale * q - 1) <= 1e-6


@pytest.mark.parametrize("real", REALS)
def test_targets_and_lost_tokens_are_kept_as_they_are_and_nothing_is_divided_by_zero(real):
    scale = make_scale(real)
    with np.errstate(invalid="ignore", under="ignore"):
        for largest in (math.inf, math.nan):
            assert scale(real(largest), real(0.5), real(0.9)) == 1
        for eps in (0.5, 1e-44, 0.0):
            assert scale(real(0), real(eps), real(2.0**-24)) == 0


@pytest.mark.usefixtures("compiler")
def test_on_a_gpu_a_draw_takes_32_bit_instructions_and_few():
    mix, draw = (cuda.jit(device=True, forceinline=True)(make(np.uint32)) for make in (make_mix, make_draw))

    def kernel(block, v, seed, out):
        out[0] = draw(block, mix(v ^ seed))

    word = cuda.types.uint32
    compiled = offline.compile_function(kernel, cuda.types.void(word, word, word, cuda.types.float32[::1]))
    assert compiled.count(r"call(\.uni)?") == 0
    assert compiled.count(r"(mul|mad|shr|xor|or|cvt|and|add)\.\S*64") == 0
    assert 10 <= compiled.count(r"(mul|mad|shr|xor|or|cvt|and|add)\.\S+") <= 14
