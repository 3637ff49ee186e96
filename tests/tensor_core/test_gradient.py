"""The gradient of one logit: what is compiled for each option, and on a GPU what it is, against float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from numba import cuda

from tests.helpers import offline
from tests.helpers.harness import SimulatorHarness

if SimulatorHarness.is_active():
    pytest.skip("the simulator has none of these instructions", allow_module_level=True)

from cce_numba.launch.kernel import Kernel, pointer_to
from cce_numba.tensor_core.gradient import make_gradient
from cce_numba.tensor_core.records import F32, RowWeights

OPTIONS = [*itertools.product([False, True], repeat=4)]
SOFTCAP = 4.0
F32_ARRAY, I32_ARRAY = pointer_to(np.float32), pointer_to(np.int32)


def make_gradient_kernel(capped, scaled, smoothed, entropic):
    """out[i] = the gradient of logit i, whose token is (7,) numbers: the fields of `RowWeights`."""
    gradient = make_gradient(capped, scaled, smoothed, entropic=entropic)

    def gradient_kernel(x, entry, tokens, targets, class_weight, softcap, out):
        i = cuda.blockIdx.x * 128 + cuda.threadIdx.x
        token = RowWeights(
            softmax=tokens[7 * i], shift=tokens[7 * i + 1], target_weight=tokens[7 * i + 2], target=targets[i],
            scale=tokens[7 * i + 4], uniform=tokens[7 * i + 5], entropy=tokens[7 * i + 6],
        )  # fmt: skip
        out[i] = gradient(x[i], entry[i], token, softcap, class_weight[i])

    parameters = F32_ARRAY, I32_ARRAY, F32_ARRAY, I32_ARRAY, F32_ARRAY, F32, F32_ARRAY
    return Kernel(gradient_kernel, parameters, threads=128)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(("capped", "scaled", "smoothed", "entropic"), OPTIONS)
def test_nothing_is_computed_for_options_that_are_not_there(capped, scaled, smoothed, entropic):
    compiled = offline.compile_hopper(make_gradient_kernel(capped, scaled, smoothed, entropic))
    # One exponential of the softmax; tanh has another, and divisions.
    assert (compiled.count(r"ex2\.approx\.ftz\.f32") > 1) == capped
    assert (compiled.count(r"div\.rn\.f32") > 0) == capped
    # Three of the token's numbers are there in any case, with x; the scale, the weights of the
    # entropy and of label smoothing, and the class weight are not.
    assert compiled.count(r"ld\.global\.f32") == 4 + scaled + 2 * smoothed + entropic
    assert compiled.stack_bytes == 0
    assert compiled.count(r"call(\.uni)?") == 0


def expected(x, entry, tokens, targets, class_weight, *, capped, scaled, smoothed, entropic):
    """`(g, magnitude)` in float64: what the docstring says, and the sum of its terms' absolute values."""
    softmax, shift, target_weight, _, scale, uniform, entropy = tokens.T.astype(np.float64)
    y = x * (scale if scaled else 1)
    z = SOFTCAP * np.tanh(y / SOFTCAP) if capped else y
    power = z * np.log2(np.e) - shift
    terms = [softmax * np.exp2(power), -target_weight * (entry == targets)]
    if entropic:
        terms.append(entropy * power * np.exp2(power))
    if smoothed:
        terms.append(-uniform * class_weight)
    slope = 1 - (z / SOFTCAP) ** 2 if capped else 1
    magnitude = sum(map(np.abs, terms))
    if entropic:  # the error of an exponent near 0 is none of the exponent's size
        magnitude += np.abs(entropy) * np.exp2(power)
    return sum(terms) * slope, magnitude


@pytest.mark.gpu
@pytest.mark.parametrize(("capped", "scaled", "smoothed", "entropic"), OPTIONS)
def test_gradients(gpu, capped, scaled, smoothed, entropic):
    cupy, rng, n = pytest.importorskip("cupy"), np.random.default_rng(0), 4096
    x = rng.normal(size=n).astype(np.float32) * 3
    entry, targets = rng.integers(0, 3, n).astype(np.int32), rng.integers(0, 3, n).astype(np.int32)
    tokens = rng.normal(size=(n, 7)).astype(np.float32)
    class_weight = rng.uniform(0, 2, n).astype(np.float32)
    # What nobody's entry, and a token without weight, must not let through.
    entry[:64] = -1
    x[32:64] = np.nan
    tokens[64:128, [0, 2, 5, 6]] = 0
    x[96:128] = np.nan
    tokens[128:160, [0, 2]] = 0  # a uniform weight alone
    options = {"capped": capped, "scaled": scaled, "smoothed": smoothed, "entropic": entropic}
    exact, magnitude = expected(x, entry, tokens, targets, class_weight, **options)
    arrays = [cupy.asarray(array) for array in (x, entry, tokens, targets, class_weight)]
    out = cupy.empty(n, np.float32)
    pointers = [array.data.ptr for array in arrays]
    make_gradient_kernel(capped, scaled, smoothed, entropic).launch(n // 128, *pointers, SOFTCAP, out.data.ptr)
    got = out.get()
    assert (got[:128] == 0).all()
    # Exponents of up to some 60 are rounded to 2^-18, and so are their exponentials, relatively.
    assert (np.abs(got - exact)[128:] <= 2.0**-16 * magnitude[128:]).all()
