"""Arrays that gradients cannot be written to get a clear error before anything is computed."""

from __future__ import annotations

import warnings

import ml_dtypes
import numpy as np
import pytest

import cce_numba as cce
from cce_numba import interchange
from cce_numba.arguments import Problem
from cce_numba.backend import backend_module

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
e = np.ones((2, 3, 4), np.float32)
c = np.ones((5, 4), np.float32)
bias = np.zeros(5, np.float32)
targets = np.array([[0, 1, 4], [2, 2, -100]])
wide = np.zeros((2, 3, 8), np.float32)
fused = np.zeros(24 + 20, np.float32)


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


class Copies:
    """Gives a copy of its array to whoever asks."""

    def __init__(self, array):
        self._array = array

    def __array__(self, dtype=None, copy=None):
        return self._array.copy()

    def __dlpack_device__(self):
        return (1, 0)


class OnlyDlpack:
    def __init__(self, array):
        self._array = array

    def __dlpack__(self, **named):
        return self._array.__dlpack__(**named)

    def __dlpack_device__(self):
        return self._array.__dlpack_device__()


@pytest.fixture
def nothing_runs(monkeypatch):
    """No backend may be asked to compute anything."""
    monkeypatch.setattr(backend_module("cpu"), "forward", None)
    monkeypatch.setattr(backend_module("cpu"), "backward", None)


RESULT = cce.forward(e, c, targets, bias=bias, backend="cpu")
CALLS = {
    "backward": lambda **named: cce.backward(RESULT, **named),
    "one call": lambda **named: cce.linear_cross_entropy_with_grad(e, c, targets, bias=bias, backend="cpu", **named),
}

ERRORS = [
    (ValueError, {"e": np.zeros((6, 4), np.float32)}, {}, ["out.e:", "shape of e, (2, 3, 4)", "(6, 4)"]),
    (ValueError, {"c": np.zeros((4, 5), np.float32)}, {}, ["out.c:", "shape of c, (5, 4)", "(4, 5)"]),
    (ValueError, {"bias": np.zeros((5, 1), np.float32)}, {}, ["out.bias:", "shape of bias, (5,)", "(5, 1)"]),
    (TypeError, {"e": np.zeros((2, 3, 4))}, {}, ["out.e:", "dtype", "float32", "float64"]),
    (TypeError, {"c": np.zeros((5, 4), np.float16)}, {}, ["out.c:", "float32", "got float16"]),
    (TypeError, {"c": np.zeros((5, 4), ">f4")}, {}, ["out.c:", "float32", "got >f4"]),
    (TypeError, {"bias": [0.0] * 5}, {}, ["out.bias:", "must be an array", "list"]),
    (TypeError, {"e": np.ma.zeros((2, 3, 4), np.float32)}, {}, ["out.e:", "masked"]),
    (ValueError, {"e": read_only(e)}, {}, ["out.e:", "writable", "read-only"]),
    (ValueError, {"bias": np.broadcast_to(bias[:1], (5,))}, {}, ["out.bias:", "read-only"]),
    (ValueError, {"e": Copies(np.zeros_like(e))}, {}, ["out.e:", "share its memory", "Copies", "copy"]),
    (ValueError, {"e": np.zeros((3, 2, 4), np.float32).transpose(1, 0, 2)}, {}, ["out.e:", "flatten"]),
    (
        ValueError,
        {"c": np.lib.stride_tricks.as_strided(np.zeros(9, np.float32), (5, 4), (4, 4))},
        {},
        ["out.c:", "share memory", "(4, 4)"],
    ),
    (ValueError, {"e": e}, {}, ["out.e:", "overlap e", "96 bytes"]),
    (ValueError, {"e": e[::-1, ::-1]}, {}, ["out.e:", "overlap e"]),
    (ValueError, {"c": c}, {}, ["out.c:", "overlap c"]),
    (ValueError, {"e": fused[:24].reshape(e.shape), "c": fused[23:43].reshape(c.shape)}, {}, ["out.e:", "overlap out.c"]),
    (ValueError, {"e": np.zeros_like(e)}, {"wrt": "c"}, ["out.e:", "must be None", "wrt leaves 'e' out"]),
    (ValueError, {"e": np.zeros_like(e)}, {"accumulate": True}, ["out.c:", "array to add to", "accumulate=True", "wrt"]),
    (
        ValueError,
        {"e": np.zeros_like(e), "c": np.zeros_like(c)},
        {"accumulate": True},
        ["out.bias:", "accumulate=True", "got None"],
    ),
    (TypeError, {}, {"accumulate": 1}, ["accumulate:", "True or False", "1"]),
]


@pytest.mark.parametrize(("kind", "arrays", "named", "says"), ERRORS, ids=lambda x: x[0] + x[1] if isinstance(x, list) else "")
@pytest.mark.parametrize("call", CALLS)
def test_arrays_that_do_not_fit(nothing_runs, call, kind, arrays, named, says):
    with pytest.raises(kind) as caught:
        CALLS[call](out=cce.Gradients(**arrays), **named)
    assert all(part in str(caught.value) for part in says), caught.value


def test_the_gradient_of_a_bias_may_go_where_that_was():
    """After `forward`, which has copied it; not in one call."""
    with pytest.raises(ValueError, match=r"out\.bias: .*overlap bias"):
        CALLS["one call"](out=cce.Gradients(bias=bias))
    own = bias.copy()
    result = cce.forward(e, c, targets, bias=own)
    expected = cce.backward(result).bias
    assert cce.backward(result, out=cce.Gradients(bias=own)).bias is own
    np.testing.assert_array_equal(own, expected)


def test_no_array_to_add_to():
    with pytest.raises(ValueError, match=r"out\.e: must be the array to add to, since accumulate=True, got None"):
        cce.backward(RESULT, accumulate=True)


def test_out_is_named():
    with pytest.raises(TypeError, match=r"out: must be cce_numba.Gradients\(e=..., c=..., bias=...\) or None, got tuple"):
        cce.backward(RESULT, out=(np.zeros_like(e), np.zeros_like(c)))


def test_no_bias_no_gradient_of_it():
    with pytest.raises(ValueError, match=r"out\.bias: must be None, since no bias was given"):
        cce.linear_cross_entropy_with_grad(e, c, targets, out=cce.Gradients(bias=np.zeros(5, np.float32)))


@pytest.mark.parametrize("name", ["e", "c"])
def test_what_accum_fp32_asks_for(name):
    inputs = {"e": e.astype(BFLOAT16), "c": c.astype(BFLOAT16)}
    out = cce.Gradients(**{name: np.zeros_like(inputs[name])})
    with pytest.raises(TypeError, match=rf"out\.{name}: dtype must be float32, since accum_{name}_fp32=True, got bfloat16"):
        cce.linear_cross_entropy_with_grad(*inputs.values(), targets, out=out, **{f"accum_{name}_fp32": True})
    cce.linear_cross_entropy_with_grad(*inputs.values(), targets, out=out)
    out = cce.Gradients(**{name: np.zeros(inputs[name].shape, np.float16)})
    with pytest.raises(TypeError, match=rf"out\.{name}: dtype must be bfloat16 or float32, got float16"):
        cce.linear_cross_entropy_with_grad(*inputs.values(), targets, out=out)


def test_another_device(monkeypatch):
    elsewhere = np.zeros_like(c)
    monkeypatch.setattr(interchange, "device_of", lambda x: "cuda:1" if x is elsewhere else "cpu")
    with pytest.raises(ValueError, match=r"out\.c: must be on the device of e, cpu, got cuda:1"):
        cce.backward(RESULT, out=cce.Gradients(c=elsewhere))


def test_a_device_needs_contiguous_rows(monkeypatch):
    monkeypatch.setattr(Problem, "on_device", True)
    with pytest.raises(ValueError, match=r"out\.e: its last dimension must be contiguous on a device, got a stride of 8 bytes"):
        cce.backward(RESULT, out=cce.Gradients(e=wide[..., ::2]))


def test_neighbours_in_one_buffer():
    expected = cce.backward(RESULT)
    out = cce.Gradients(e=fused[:24].reshape(e.shape), c=fused[24:].reshape(c.shape))
    grads = cce.backward(RESULT, out=out)
    assert grads.e is out.e
    np.testing.assert_array_equal(fused, np.concatenate([expected.e.ravel(), expected.c.ravel()]))
    np.testing.assert_array_equal(grads.bias, expected.bias)


def test_arrays_of_other_kinds():
    """By DLPack, and subclasses: the memory is written, and the caller's own object comes back."""

    class Mine(np.ndarray):
        pass

    expected = cce.backward(RESULT)
    memory = np.zeros_like(e), np.zeros_like(c).view(Mine)
    out = cce.Gradients(e=OnlyDlpack(memory[0]), c=memory[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grads = cce.backward(RESULT, out=out, wrt=("e", "c"))
    assert grads.e is out.e
    assert grads.c is out.c
    np.testing.assert_array_equal(memory[0], expected.e)
    np.testing.assert_array_equal(memory[1], expected.c)


def test_an_upstream_gradient_that_does_not_fit_leaves_the_arrays_alone():
    out = cce.Gradients(e=np.full_like(e, 3), c=np.full_like(c, 3), bias=np.full_like(bias, 3))
    with pytest.raises(ValueError, match="d_loss"):
        cce.backward(RESULT, d_loss=np.ones(3), out=out)
    assert all((x == 3).all() for x in (out.e, out.c, out.bias))
