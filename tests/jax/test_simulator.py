"""A forward by the portable kernels, in Numba's simulator, reaches their backward: their statistics have another form."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("jax", reason="JAX is not installed")

ROOT = Path(__file__).parents[2]
PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
import cce_numba as cce
from cce_numba.jax import linear_cross_entropy, state

state._may_run_on_a_gpu, state.BACKENDS = (lambda: True), ("simt", "cpu")  # as if there were a GPU for these
random = np.random.default_rng(0)
e, c = (jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in ((9, 5), (20, 5)))
targets = jnp.asarray([3, -100, 4, 19, -100, 0, 1, 2, 2])
for options in {"filter_eps": 0.05}, {"softcap": 5.0, "label_smoothing": 0.1}:
    ours = lambda e, c: linear_cross_entropy(e, c, targets, backend="simt", **options)
    loss, grads = jax.jit(jax.value_and_grad(ours, (0, 1)))(e, c)
    exact, exact_grads = cce.linear_cross_entropy_with_grad(*map(np.asarray, (e, c, targets)), backend="simt", **options)
    assert loss == exact
    np.testing.assert_array_equal(grads[0], exact_grads.e)
    np.testing.assert_array_equal(grads[1], exact_grads.c)
    assert abs(grads[1]).max() > 0
print("all is well")
"""


def test_the_portable_kernels_state(monkeypatch):
    monkeypatch.setenv("NUMBA_ENABLE_CUDASIM", "1")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "all is well\n", done.stderr
