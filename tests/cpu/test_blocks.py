"""The CPU backend's own promises: any block sizes give the same, memory stays bounded, progress is told, exp is exact."""

from __future__ import annotations

import os
import signal
import time
import tracemalloc
import warnings

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numba import njit

import cce_numba as cce
from cce_numba.arguments import Outline
from cce_numba.cpu import backend
from cce_numba.cpu.elements import exp_float32
from cce_numba.cpu.tiles import CpuTiles, choose_tiles
from cce_numba.options import FILTERS, Options
from cce_numba.progress import reported_to
from tests.helpers.cases import DTYPES, Edges, cases, filters, make_case, with_terms
from tests.helpers.checks import check_forward, check_gradients, expect
from tests.helpers.harness import CpuHarness

EDGES = Edges(n=(1, 4, 8), v=(1, 8, 16), d=(1,), max_n=30, max_v=60, max_d=9)


@given(data=st.data())
def test_any_blocks(data):
    """Small blocks put many edges into small problems; tokens in groups exercise the separate passes of 16-bit gradients."""
    survivor_block = data.draw(st.sampled_from([1, 2, 4]), label="survivor_block")
    multiple = st.integers(1, 3).map(lambda k: k * survivor_block)
    tiles = CpuTiles(survivor_block, data.draw(multiple), data.draw(st.sampled_from([8, 16])), data.draw(multiple))
    case = data.draw(cases(EDGES))
    case = data.draw(with_terms(case.with_options(**data.draw(filters()))))
    harness = CpuHarness()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "choose_tiles", lambda p: tiles)
        expected, result = expect(case), harness.forward(case)
        check_forward(expected, harness.numbers(result))
        check_gradients(expected, harness.backward(result), harness.kept(result, len(case.c)))


@given(
    N=st.integers(0, 10**6),
    V=st.integers(1, 10**6),
    D=st.integers(1, 2**15),
    dtype=st.sampled_from(DTYPES),
    accum_e_fp32=st.booleans(),
)
def test_only_a_huge_D_makes_blocks_of_survivors_smaller(N, V, D, dtype, accum_e_fp32):
    """So their form is known where N and V are not."""
    options = Options.of(dtype, {"accum_e_fp32": accum_e_fp32})
    p = Outline(N, V, D, dtype, False, "cpu", options)
    tiles = choose_tiles(p)
    assert backend.statistics_form(p).survivor_block == tiles.survivor_block
    if D <= 2**14:
        assert tiles.survivor_block == 128


def test_where_nearly_everything_survives_all_does():
    """Then picking columns would cost more than it saves; the gradients are exact, to the bit."""
    flat = make_case(0, (300,), 200, 8, spread=0.1)
    filtered, exact = (CpuHarness().forward(flat.with_options(filter_eps=eps)) for eps in (2.0**-12, None))
    assert filtered.survivor_counts().tolist() == [200, 200, 200]
    np.testing.assert_array_equal(cce.backward(filtered).e, cce.backward(exact).e)
    np.testing.assert_array_equal(cce.backward(filtered).c, cce.backward(exact).c)


@pytest.mark.parametrize("terms", [{}, {"label_smoothing": 0.1, "z_loss": 1e-4}], ids=["plain", "terms"])
@pytest.mark.parametrize("filter_eps", ["auto", None])
@pytest.mark.parametrize(
    ("N", "V", "D", "dtype"),
    [(1024, 20_000, 256, np.float32), (6000, 3000, 1024, ml_dtypes.bfloat16), (50, 200_000, 16, np.float32)],
    ids=["usual", "dE in groups", "wide"],
)
def test_memory_stays_within_64_mib_and_within_the_plan(N, V, D, dtype, filter_eps, terms):
    case = make_case(0, (N,), V, D, np.dtype(dtype), spread=1.0)
    small = make_case(0, (2,), 8, D, np.dtype(dtype))
    for filter_ in FILTERS:
        CpuHarness().backward(CpuHarness().forward(small.with_options(filter=filter_, filter_eps=0.5)))  # compiles
    plan = cce.explain(case.e, case.c, case.targets, filter_eps=filter_eps)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        _, grads = cce.linear_cross_entropy_with_grad(case.e, case.c, case.targets, filter_eps=filter_eps, **terms)
        extra = tracemalloc.get_traced_memory()[1] - before - grads.e.nbytes - grads.c.nbytes
    finally:
        tracemalloc.stop()
    assert extra <= 64 * 2**20
    assert extra <= plan.backward_bytes + plan.survivor_bytes + 2**20
    assert np.abs(grads.c.astype(np.float32)).max() > 0


def test_progress_is_told_and_ends_at_the_total():
    case = make_case(0, (40,), 9000, 8)
    told = []
    with reported_to(lambda *step: told.append(step)):
        cce.linear_cross_entropy_with_grad(case.e, case.c, case.targets)
    for what in ("forward", "backward"):
        steps = [(done, total) for name, done, total in told if name == what]
        assert len(steps) > 1
        assert [done for done, _ in steps] == list(range(1, steps[0][1] + 1))
    count = len(told)
    cce.linear_cross_entropy(case.e, case.c, case.targets)
    assert len(told) == count


def test_exp_is_within_two_units_and_keeps_nan():
    @njit
    def exp_of(x, out):
        for i in range(x.size):
            out[i] = exp_float32(x[i])

    x = np.linspace(-100, 88, 1_000_001).astype(np.float32)
    out = np.full_like(x, np.nan)
    exp_of(x, out)
    exact = np.exp(x.astype(np.float64))
    near = x >= -87
    assert (np.abs(out[near] - exact[near]) <= 2 * np.spacing(exact[near].astype(np.float32))).all()
    assert (out[~near] == 0).all()
    special = np.array([np.nan, -np.inf, 0.0], np.float32)
    out = np.empty_like(special)
    exp_of(special, out)
    np.testing.assert_array_equal(out, [np.nan, 0, 1])


def test_threads_may_call_at_the_same_time():
    from concurrent.futures import ThreadPoolExecutor

    cases_ = [make_case(seed, (200,), 3000, 16, DTYPES[2]) for seed in range(4)]
    alone = [cce.linear_cross_entropy_with_grad(x.e, x.c, x.targets) for x in cases_]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda x: cce.linear_cross_entropy_with_grad(x.e, x.c, x.targets), cases_))
    for (loss, grads), (other_loss, other) in zip(alone, together, strict=True):
        assert loss == other_loss
        np.testing.assert_array_equal(grads.c, other.c)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_has_threads_of_its_own():
    case = make_case(0, (300,), 3000, 16)
    expected = cce.linear_cross_entropy(case.e, case.c, case.targets)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # "this process is multi-threaded": that is the point
        child = os.fork()
    if child == 0:
        same = cce.linear_cross_entropy(case.e, case.c, case.targets) == expected
        os._exit(0 if same else 1)
    for _ in range(300):
        finished, status = os.waitpid(child, os.WNOHANG)
        if finished:
            break
        time.sleep(0.1)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("the forked process hangs")
    assert os.waitstatus_to_exitcode(status) == 0
