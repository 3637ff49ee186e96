"""Which numbers the tensor cores get, who is asked for them, and how close float32's products come to float64's."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

import cce_numba as cce
from cce_numba import arguments, gpu, plan
from cce_numba.ampere import backend
from cce_numba.ampere.elements import elements_of
from cce_numba.ampere.tiles import tiles_for
from cce_numba.backend import backend_module

F16, F32 = np.dtype(np.float16), np.dtype(np.float32)
_UNIT = 2**13  # of the last bit of a tf32 number


def problem(dtype, **options):
    e, c, targets = np.ones((4, 8), dtype), np.ones((16, 8), dtype), np.zeros(4, np.int64)
    return arguments.problem(e, c, targets, options)


@pytest.fixture
def on_a100(monkeypatch):
    """A machine that seems to have an A100, for whoever asks which backend runs."""
    a100 = SimpleNamespace(compute_capability=(8, 0), multiprocessors=108)
    monkeypatch.setattr(gpu, "SIMULATED", False)
    monkeypatch.setattr(gpu, "why_not", lambda on_device: None)
    monkeypatch.setattr(gpu, "current", lambda: a100)


def test_a_stage_is_128_bytes_of_each_row():
    for dtype, terms in ((F16, 64), (F32, 32)):
        elements = elements_of(dtype)
        assert (elements.terms, elements.parts * elements.terms) == (terms, 128)
        assert elements.g_row_bytes == 128 * dtype.itemsize
    assert elements_of(F32, allow_tf32=True).name == "tf32"
    assert elements_of(F32).split
    assert not elements_of(F32, allow_tf32=True).split


@pytest.mark.usefixtures("on_a100")
def test_float32_comes_to_tensor_cores_on_request_alone():
    chosen, rejected = plan.choose_backend(problem(F32), None)
    assert chosen == "simt"
    assert rejected["ampere"] == "it takes float32 only on request: by its name, or, rounded to tf32, by allow_tf32=True"
    assert plan.choose_backend(problem(F32), "ampere") == ("ampere", {})
    assert plan.choose_backend(problem(F32, allow_tf32=True), None)[0] == "ampere"
    assert plan.choose_backend(problem(F16), None)[0] == "ampere"
    assert "float64" in backend.why_not(problem(np.dtype(np.float64)))


@pytest.mark.usefixtures("on_a100")
def test_survivors_of_float32_have_rows_of_its_tiles():
    assert backend.statistics_form(problem(F32)).row_unit_bytes == 128 // 8
    assert backend.statistics_form(problem(F16)).row_unit_bytes == 256 // 8


@pytest.mark.parametrize("name", ["simt", "cpu", "hopper"])
def test_others_refuse_tf32(name):
    assert "allow_tf32" not in backend_module(name).EXTRAS
    x = problem(F32, allow_tf32=True)
    assert x.extras == {"allow_tf32"}
    with pytest.raises(NotImplementedError, match="allow_tf32: backend 'cpu' does not have it yet: allow_tf32"):
        cce.linear_cross_entropy(x.e, x.c, x.targets, allow_tf32=True, backend="cpu")


def test_tf32_means_nothing_for_other_dtypes():
    x = problem(np.dtype(np.float64), allow_tf32=True)
    assert not x.extras
    np.testing.assert_array_equal(cce.linear_cross_entropy(x.e, x.c, x.targets, allow_tf32=True), np.log(16))
    with pytest.raises(TypeError, match="allow_tf32: must be True or False"):
        cce.linear_cross_entropy(x.e, x.c, x.targets, allow_tf32=1)


@pytest.mark.parametrize("cc", [(8, 0), (12, 0)], ids=str)
def test_the_host_launches_kernels_of_float32(cc):
    """On a GPU that is not there: loss and gradients of sizes with and without copies, each kernel once."""
    from cce_numba.commands.precompile import kernels_of

    runs, kernels = kernels_of("ampere", "float32", [], cc)
    assert runs == "ampere"
    names = [kernel.function.__name__ for kernel in kernels]
    assert names.count("forward_kernel") == 4, "with survivors and without, rows of whole 16 bytes and others"
    assert names.count("backward_kernel") == 2, "by chance, and all"
    assert {kernel.smem_bytes for kernel in kernels if kernel.function.__name__ == "forward_kernel"} == {
        tiles_for(cc, wide=True).smem_bytes
    }


# ---- an emulation of tensor cores that cut off what they add. `mma` sums eight terms, exactly but for that


def cut(x, bits):
    """x, to so many significant bits of each number's largest neighbour on the last axis, towards zero."""
    unit = np.exp2(np.floor(np.log2(np.maximum(np.abs(x).max(axis=-1, keepdims=True), 1e-300))) - (bits - 1))
    return np.trunc(x / unit) * unit


def mma(sums, a, b):
    """sums (n, v) plus a (n, 8) times b (v, 8), as tensor cores that keep 24 bits of each term find it."""
    a, b = (cut_off_tf32(x).astype(np.float64) for x in (a, b))
    terms = np.concatenate([sums[..., None], a[:, None, :] * b[None, :, :]], axis=-1)
    return cut(cut(terms, 24).sum(axis=-1, keepdims=True), 24)[..., 0]


def cut_off_tf32(x):
    """What tensor cores see of float32 numbers."""
    return (x.view(np.uint32) & np.uint32(2**32 - _UNIT)).view(np.float32)


def split(x):
    """As `product._split` has it."""
    rounded = x.view(np.uint32) + np.uint32(_UNIT // 2)
    rounded = np.minimum(rounded.view(np.int32), np.int32(0x7F7FFFFF)).view(np.uint32)
    rounded = np.minimum(rounded, np.uint32(0xFF7FFFFF))
    high = (rounded & np.uint32(2**32 - _UNIT)).view(np.float32)
    return high, x - high


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_is_not_finite_is_in_the_low_part():
    """So products with it are what they are without splitting: with the other number's sign, and NaN with 0."""
    nan = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000], np.uint32).view(np.float32)
    x = np.concatenate([np.array([np.inf, -np.inf, 3.4028235e38, -3.4028235e38], np.float32), nan])
    high, low = split(x)
    assert np.isfinite(high).all()
    np.testing.assert_array_equal(high + low, x)
    for y in np.array([2.5, -1e-3, 1.0, 0.0, np.inf], np.float32):
        y_high, y_low = split(np.array([y]))
        found = (low * y_high + high * y_low) + high.astype(np.float64) * y_high
        expected = x.astype(np.float64) * y
        for kind in (np.isnan, np.isposinf, np.isneginf):
            np.testing.assert_array_equal(kind(found[[0, 1, 4, 5, 6]]), kind(expected[[0, 1, 4, 5, 6]]))


def by_tensor_cores(e, c, *, adds_outside):
    """Logits from split numbers; adds_outside: sums of eight terms are added by ordinary additions."""
    n, v = len(e), len(c)
    logits, sums = np.zeros((n, v), np.float32), np.zeros((n, v))
    for k in range(0, e.shape[1], 8):
        (e_high, e_low), (c_high, c_low) = split(e[:, k : k + 8].copy()), split(c[:, k : k + 8].copy())
        for a, b in ((e_low, c_high), (e_high, c_low), (e_high, c_high)):
            sums = mma(sums, a, b)
        if adds_outside:
            logits, sums = logits + sums.astype(np.float32), np.zeros((n, v))
    return logits + sums.astype(np.float32)


def by_fma(e, c):
    """Logits summed term by term, each rounded once."""
    logits = np.zeros((len(e), len(c)))
    for k in range(e.shape[1]):
        logits = (logits + np.multiply.outer(e[:, k].astype(np.float64), c[:, k])).astype(np.float32).astype(np.float64)
    return logits


@pytest.mark.parametrize("common", [0, 1], ids=["centred", "with a common part"])
@pytest.mark.parametrize("D", [64, 1024])
def test_logits_of_split_numbers_are_as_close_as_those_of_fma(D, common):
    """At most twice as far off is what is asked for. Sums that stay on tensor cores would not be."""
    rng = np.random.default_rng(D)
    e = (rng.normal(size=(24, D)) + common).astype(np.float32)
    c = ((rng.normal(size=(24, D)) + common) / np.sqrt(D)).astype(np.float32)
    exact = e.astype(np.float64) @ c.T.astype(np.float64)
    allowed = np.linalg.norm(by_fma(e, c) - exact)
    assert np.linalg.norm(by_tensor_cores(e, c, adds_outside=True) - exact) <= (1 if D == 1024 else 2) * allowed
    if D == 1024:
        assert np.linalg.norm(by_tensor_cores(e, c, adds_outside=False) - exact) > 2 * allowed


def test_the_parts_of_a_number_are_the_number():
    """But for what tensor cores cut off of the low part: below 2^-22 of the number."""
    x = np.random.default_rng(0).normal(size=10_000).astype(np.float32)
    high, low = split(x)
    np.testing.assert_array_equal(cut_off_tf32(high), high)
    np.testing.assert_array_equal(high + low, x)
    assert np.abs((high.astype(np.float64) + cut_off_tf32(low)) - x).max() <= 2.0**-22 * np.abs(x).max()
