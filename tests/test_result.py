"""What `forward` leaves to `backward`: small arrays are its own, and of large ones a change is noticed where it can be."""

from __future__ import annotations

import numpy as np
import pytest

import cce_numba as cce
from tests.helpers.cases import DTYPES, make_case

N, V = 7, 30
SMALL = ["targets", "bias", "logit_scale", "class_weights", "token_weights"]


def problem(dtype=DTYPES[2], **dtypes):
    """All arrays that a caller may pass. `dtypes`: of those that may have another than e."""
    case = make_case(0, (N,), V, 5, dtype)
    rng = np.random.default_rng(1)
    arrays = {"bias": rng.uniform(-1, 1, V), "class_weights": rng.uniform(0.5, 1, V)}
    arrays |= {name: rng.uniform(0.5, 1, N) for name in ("logit_scale", "token_weights")}
    arrays["targets"] = case.targets
    dtypes = {"targets": np.int64} | dtypes
    return {"e": case.e, "c": case.c} | {name: x.astype(dtypes.get(name, dtype)) for name, x in arrays.items()}


def changed(array):
    """In place, to other values that are as good: ids stay ids."""
    array[...] = np.roll(array, 1)


@pytest.mark.parametrize("options", [{}, {"softcap": 4.0, "label_smoothing": 0.2}, {"label_smoothing": 0.2}], ids=str)
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("targets", "int32"), ("targets", "int64"), *((name, dtype) for name in SMALL[1:] for dtype in ("float32", "float64"))],
)
def test_small_arrays_may_change_after_the_forward(name, dtype, options):
    """Whether a conversion has copied them or not: a loader fills its buffers again."""
    arrays = problem(np.dtype(dtype if dtype.startswith("float") else "float32"), **{name: dtype})
    result = cce.forward(**arrays, filter_eps=None, **options)
    expected = cce.backward(result)
    nll = np.array(result.nll)
    changed(arrays[name])
    actual = cce.backward(result)
    for gradient in ("e", "c", "bias"):
        np.testing.assert_array_equal(getattr(actual, gradient), getattr(expected, gradient))
    np.testing.assert_array_equal(result.nll, nll)
    assert not np.array_equal(cce.backward(cce.forward(**arrays, filter_eps=None, **options)).c, expected.c)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_large_ones_are_not_copied(dtype):
    arrays = problem(dtype)
    kept = cce.forward(**arrays)._problem
    for name in ("e", "c"):
        assert np.shares_memory(getattr(kept, name), arrays[name])


@pytest.mark.parametrize("name", ["e", "c"])
def test_tensors_that_changed_are_told(name):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    arrays = {other: torch.from_numpy(x) for other, x in problem().items()}
    result = cce.forward(**arrays)
    cce.backward(result)
    arrays[name].mul_(2)
    with pytest.raises(ValueError, match=f"{name}: was changed in place, or its memory was freed, after forward read it"):
        cce.backward(result)
    again = cce.forward(**arrays)
    arrays[name].set_(arrays[name].clone().untyped_storage(), 0, arrays[name].shape)
    with pytest.raises(ValueError, match=f"{name}: was changed in place, or its memory was freed"):
        cce.backward(again)
