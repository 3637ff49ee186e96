"""What only a GPU can show: XLA's stream and memory, and that nothing is copied. It needs a JAX with CUDA."""

from __future__ import annotations

import os

import numpy as np
import pytest

from tests.conftest import skip_or_fail_without_gpu
from tests.jax.conftest import make

jax = pytest.importorskip("jax", reason="JAX is not installed")
jnp = pytest.importorskip("jax.numpy")
ccj = pytest.importorskip("cce_numba.jax")
pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def cuda():
    """A device of JAX's."""
    skip_or_fail_without_gpu()
    try:
        return jax.devices("cuda")[0]
    except RuntimeError:
        reason = "this JAX has no CUDA: pip install 'jax[cuda13]'"
        (pytest.fail if os.environ.get("CCE_REQUIRE_GPU") == "1" else pytest.skip)(reason)


@pytest.mark.parametrize(
    "options", [{}, {"filter": "drop"}, {"filter_eps": None}, {"softcap": 9.0, "label_smoothing": 0.1}], ids=str
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_gives_the_bits_of_the_functions_for_arrays(cuda, dtype, options):
    cupy = pytest.importorskip("cupy")
    import cce_numba as cce

    given = make(0, (2, 300), 5000, 128, dtype, ignored=0.2)
    arrays = [jax.device_put(given[name], cuda) for name in ("e", "c", "bias")]
    targets = jax.device_put(given["targets"], cuda)
    step = jax.jit(
        jax.value_and_grad(lambda e, c, bias: ccj.linear_cross_entropy(e, c, targets, bias=bias, **options), argnums=(0, 1, 2))
    )
    for _ in range(3):  # later ones reuse memory
        loss, grads = step(*arrays)
    e, c, bias, ids = (cupy.asarray(np.asarray(x)) for x in (*arrays, targets))
    exact, exact_grads = cce.linear_cross_entropy_with_grad(e, c, ids, bias=bias, **options)
    assert float(loss) == float(exact)
    for grad, name in zip(grads, ("e", "c", "bias"), strict=True):
        expected = getattr(exact_grads, name).get()
        np.testing.assert_array_equal(np.asarray(grad).view(np.uint8), expected.view(np.uint8), err_msg=name)


def test_between_operations_of_xla(cuda):
    """The kernels come after what makes their inputs and before what reads their results."""
    given = make(1, (4096,), 30_000, 256, "bfloat16")
    e, c, targets = (jax.device_put(given[name], cuda) for name in ("e", "c", "targets"))

    def total(e, c):
        e = jax.lax.fori_loop(0, 200, lambda _, x: jnp.sort(x, axis=0), e)  # slow
        return ccj.linear_cross_entropy(e * 2, c, targets) * 3

    loss, (_, d_c) = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(e, c)
    alone, d_alone = jax.value_and_grad(lambda c: ccj.linear_cross_entropy(jnp.sort(e, axis=0) * 2, c, targets))(c)
    assert abs(float(loss) - 3 * float(alone)) <= 1e-5 * float(loss)
    error = jnp.linalg.norm((d_c - 3 * d_alone).astype(jnp.float32)) / jnp.linalg.norm(d_c.astype(jnp.float32))
    assert float(error) <= 2.0**-7


def test_nothing_is_copied(cuda):
    """`python -m benchmarks jit` looks at addresses."""
    jit = pytest.importorskip("benchmarks.programs.jit")
    call = jit.measured((512, 8192, 256), 1, cuda)
    assert call["copied"] == []
    assert call["wrong"] == ""
