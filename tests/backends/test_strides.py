"""Views of all kinds: rows apart, columns apart, reversed, transposed, leading dimensions, a single token without any."""

from __future__ import annotations

import numpy as np
import pytest

import cce_numba as cce
from cce_numba import interchange
from tests.helpers.cases import DTYPES, Case, make_case
from tests.helpers.checks import check_forward, check_gradients, expect

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def views(array):
    """Names and (parent, view) pairs of equal contents; the parent travels to the device, the view is taken there."""
    rows, columns = array.shape
    spaced = np.zeros((2 * rows, columns + 3), array.dtype)
    spaced[::2, :columns] = array
    between = np.zeros((rows, 2 * columns), array.dtype)
    between[:, ::2] = array
    return {
        "rows apart": (spaced, lambda x: x[::2, :columns]),
        "columns apart": (between, lambda x: x[:, ::2]),
        "transposed": (np.ascontiguousarray(array.T), lambda x: x.T),
        "reversed": (np.ascontiguousarray(array[::-1, ::-1]), lambda x: x[::-1, ::-1]),
    }


@pytest.mark.parametrize("dtype", DTYPES[1:3], ids=str)
@pytest.mark.parametrize("kind", ["rows apart", "columns apart", "transposed", "reversed"])
@pytest.mark.parametrize("of", ["e", "c"])
def test_strided_inputs(harness, edges, of, kind, dtype):
    harness.skip_unless_it_takes(dtype)
    case = make_case(1, (edges.n[-1] + 1,), edges.v[-1] + 1, edges.d[-1] + 1, dtype, ignored=0.1)
    parent, view = views(getattr(case, of))[kind]
    strided = view(harness.device(parent))
    assert not strided.flags.c_contiguous
    arrays = [strided if name == of else harness.device(getattr(case, name)) for name in ("e", "c", "targets")]
    result = cce.forward(*arrays, backend=harness.backend, **case.options)
    expected = expect(case)
    check_forward(expected, harness.numbers(result))
    check_gradients(
        expected, harness.backward(result), harness.kept(result, case.c.shape[0]), coarse_eps=result.plan.coarse_eps
    )


@pytest.mark.parametrize("of", ["targets", "bias"])
def test_strided_vectors(harness, edges, of):
    case = make_case(4, (edges.n[-1] + 1,), edges.v[-1] + 1, edges.d[-1], edges.dtype, ignored=0.1, bias=True)
    vectors = {"targets": case.targets, "bias": case.options["bias"]}
    between = np.zeros((len(vectors[of]), 3), vectors[of].dtype)
    between[:, 1] = vectors[of]
    given = {name: harness.device(between)[:, 1] if name == of else harness.device(x) for name, x in vectors.items()}
    options = {**case.options, "bias": given["bias"]}
    result = cce.forward(*map(harness.device, (case.e, case.c)), given["targets"], backend=harness.backend, **options)
    expected = expect(case)
    check_forward(expected, harness.numbers(result))
    check_gradients(
        expected, harness.backward(result), harness.kept(result, case.c.shape[0]), coarse_eps=result.plan.coarse_eps
    )


def test_one_target_for_all(harness, edges):
    case = make_case(5, (edges.n[-1] + 1,), edges.v[-1] + 1, edges.d[-1], edges.dtype)
    case.targets[:] = 3
    e, c, one = map(harness.device, (case.e, case.c, case.targets[:1]))
    targets = interchange.array_module(one).broadcast_to(one, case.targets.shape)
    check_forward(expect(case), harness.numbers(cce.forward(e, c, targets, backend=harness.backend)))


SHAPES = [(), (1,), (2, 3), (1, 2, 3)]
SHIFTED = [(2,), (2, 3), (1, 2, 3)]  # of a sequence of one token a shift would leave none


@pytest.mark.parametrize(("shape", "shift"), [(shape, 0) for shape in SHAPES] + [(shape, 1) for shape in SHIFTED])
def test_leading_dimensions(harness, edges, shape, shift):
    case = make_case(2, shape, edges.v[-1] + 1, edges.d[-1], edges.dtype, bias=True, shift=shift, reduction="none")
    expected, result = expect(case), harness.forward(case)
    check_forward(expected, harness.numbers(result))
    check_gradients(
        expected, harness.backward(result), harness.kept(result, case.c.shape[0]), coarse_eps=result.plan.coarse_eps
    )


@pytest.mark.parametrize("integer", [np.int8, np.uint8, np.int16, np.int32, np.uint32, np.uint64])
def test_integer_targets_of_any_width(harness, edges, integer):
    case = make_case(3, (5,), 20, edges.d[-1], edges.dtype)
    narrow = Case(case.e, case.c, case.targets.astype(integer), case.options)
    assert harness.numbers(harness.forward(narrow))["loss"] == harness.numbers(harness.forward(case))["loss"]
