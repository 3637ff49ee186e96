"""Threads: how many a call takes, what becomes of errors, and that there need not be any."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest

import cce_numba as cce
from cce_numba import arguments
from cce_numba.cpu import blas, threads
from tests.helpers.cases import DTYPES, make_case

ROOT = Path(__file__).parents[2]
NEEDS_OPENBLAS = pytest.mark.skipif(blas._control() is None, reason="this NumPy has another BLAS than OpenBLAS")


def problem(kind=np.asarray):
    e, c, targets = np.ones((4, 2), np.float32), np.ones((8, 2), np.float32), np.zeros(4, np.int64)
    return arguments.problem(kind(e), kind(c), kind(targets), {})


def threads_taken(p):
    """`(threads that share work, threads that a product takes)` in a call."""
    seen = set()

    def note(_):
        seen.add(threading.get_ident())
        time.sleep(0.02)

    with threads.of(p):
        threads.for_each(note, range(12))
        return len(seen), blas._control()[0]()


@pytest.fixture
def four_cores(monkeypatch):
    """As far as `threads` can see."""
    monkeypatch.setattr(threads, "_cores", lambda: 4)
    monkeypatch.setattr(threads, "_SMALL", 0)
    threads._pool.cache_clear()
    yield
    threads._pool.cache_clear()


@pytest.fixture
def four_threads(four_cores, monkeypatch):
    """Four cores, and nothing that limits NumPy's arrays to fewer threads."""
    monkeypatch.setattr(blas, "threads", lambda: 4)


@pytest.fixture
def product_threads():
    """Sets how many threads a product takes, as `threadpoolctl` and the environment do; until the test ends."""
    get, put = blas._control()
    before = get()
    yield put
    put(before)


@NEEDS_OPENBLAS
@pytest.mark.usefixtures("four_cores")
@pytest.mark.parametrize("count", [1, 2])
def test_numpys_arrays_take_as_many_threads_as_its_blas(product_threads, count):
    product_threads(count)
    assert threads_taken(problem()) == (count, 1)


@NEEDS_OPENBLAS
@pytest.mark.usefixtures("four_cores")
def test_tensors_take_as_many_threads_as_pytorch(product_threads):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    product_threads(2)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert threads_taken(problem(torch.from_numpy)) == (1, 1)
        assert blas.threads() == 2, "and NumPy has its own again"
        torch.set_num_threads(3)
        assert threads_taken(problem(torch.from_numpy)) == (3, 1)
    finally:
        torch.set_num_threads(before)


@NEEDS_OPENBLAS
def test_limits_of_calls_that_overlap(product_threads):
    """Neither ends the other's, and what was before comes back."""
    product_threads(2)
    first, second = blas.limited(1), blas.limited(1)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert (blas._control()[0](), blas.threads()) == (1, 2)
    second.__exit__(None, None, None)
    assert (blas._control()[0](), blas.threads()) == (2, 2)


@pytest.mark.usefixtures("four_threads")
def test_each_item_has_its_turn_once():
    seen = []
    with threads.of(problem()), threads.at_most(1):
        threads.for_each(seen.append, range(10))
    assert seen == list(range(10))
    seen.clear()
    with threads.of(problem()):
        threads.for_each(seen.append, range(1000))
    assert sorted(seen) == list(range(1000))
    threads.for_each(pytest.fail, ())


@pytest.mark.usefixtures("four_threads")
def test_a_small_problem_wakes_nobody(monkeypatch):
    monkeypatch.setattr(threads, "_SMALL", 65)
    assert threads_taken(problem())[0] == 1
    monkeypatch.setattr(threads, "_SMALL", 64)
    assert threads_taken(problem())[0] > 1


@pytest.mark.usefixtures("four_threads")
def test_what_is_shared_is_not_shared_again():
    seen = set()

    def inner(_):
        threads.for_each(lambda _: seen.add((threads._allowed(), threading.get_ident())), range(3))
        time.sleep(0.01)

    with threads.of(problem()):
        threads.for_each(inner, range(8))
    assert {allowed for allowed, _ in seen} == {1}


@pytest.mark.usefixtures("four_threads")
@pytest.mark.parametrize("shape", [(1, 3, 2), (63, 5, 4), (64, 1, 1), (129, 7, 3), (600, 20, 30)])
def test_a_product_whose_rows_are_shared(shape):
    m, k, n = shape
    rng = np.random.default_rng(0)
    a, b = rng.integers(-9, 9, (k, m)).astype(float).T, rng.integers(-9, 9, (k, n)).astype(float)
    with threads.of(problem()):
        np.testing.assert_array_equal(threads.multiply(a, b), a @ b)


@pytest.mark.usefixtures("four_threads")
@pytest.mark.parametrize("where", ["this thread", "another"])
def test_an_error_in_any_thread_is_raised_here(where):
    here = threading.get_ident()

    def fail(_):
        time.sleep(0.01)
        if (threading.get_ident() == here) == (where == "this thread"):
            raise ArithmeticError("as it happens")

    with threads.of(problem()), pytest.raises(ArithmeticError, match="as it happens"):
        threads.for_each(fail, range(50))


def test_without_a_thread_to_be_had_this_one_works(monkeypatch):
    class Over:
        def submit(self, work):
            raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    monkeypatch.setattr(threads, "_pool", Over)
    monkeypatch.setattr(threads, "_SMALL", 0)
    seen = []
    with threads.of(problem()):
        threads.for_each(lambda i: seen.append((i, threading.get_ident())), range(5))
    assert seen == [(i, threading.get_ident()) for i in range(5)]


PROGRAM = """
import atexit, threading, time
import numpy as np, cce_numba as cce
rng = np.random.default_rng(0)
e, c, targets = rng.standard_normal((600, 80)), rng.standard_normal((900, 80)), rng.integers(0, 900, 600)
def work(what):
    print(what, cce.linear_cross_entropy_with_grad(e, c, targets)[0], flush=True)
def later():
    threading.main_thread().join()
    time.sleep(0.2)
    work("thread")
work("main")
threading.Thread(target=later).start()
atexit.register(work, "atexit")
"""


def test_work_goes_on_when_the_main_thread_is_over():
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    losses = dict(line.split() for line in done.stdout.splitlines())
    assert set(losses) == {"main", "thread", "atexit"}, done.stderr
    assert len(set(losses.values())) == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_numpy_is_told_to_raise_does_not_stop_a_call(dtype):
    """Products underflow and overflow, and NaN and inf are among the inputs."""
    case = make_case(0, (300,), 600, 16, dtype, spread=30.0, bias=True)
    case.options["bias"][:5] = -np.inf
    case.e[7] = np.nan
    case.e[8:12] *= 1e-4
    want = cce.linear_cross_entropy_with_grad(case.e, case.c, case.targets, **case.options)
    with np.errstate(all="raise"):
        loss, grads = cce.linear_cross_entropy_with_grad(case.e, case.c, case.targets, label_smoothing=0.1, **case.options)
        result = cce.forward(case.e, case.c, case.targets, **case.options)
        again = cce.backward(result, d_loss=1.0, d_lse=1e-30)
        result.nll, result.dropped_mass(), result.survivor_counts()
        cce.linear_logsumexp(case.e, case.c)
        cce.indexed_dot(case.e, case.c, case.targets)
        assert np.geterr()["under"] == "raise", "and it is told so still"
    assert np.isnan(loss)
    assert grads.e.shape == case.e.shape
    np.testing.assert_array_equal(np.isnan(again.e), np.isnan(want[1].e))


def test_pytorch_too():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    from cce_numba.torch import linear_cross_entropy

    e, c = ((torch.randn(n, 64) * 3).requires_grad_() for n in (300, 2000))
    with np.errstate(all="raise"):
        linear_cross_entropy(e, c, torch.randint(0, 2000, (300,))).backward()
    assert c.grad.isfinite().all()


def test_inf_and_nan_are_no_warnings():
    """Not in other threads either, which have settings of their own."""
    case = make_case(0, (600,), 90, 16, DTYPES[0], spread=30.0)
    case.e[::7] = np.inf
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cce.linear_cross_entropy_with_grad(case.e, case.c, case.targets, accum_e_fp32=True)
