"""Several devices, which JAX makes of one CPU: what is refused, and the way out. And the examples of docs/jax.md."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("jax", reason="JAX is not installed")

ROOT = Path(__file__).parents[2]

ON_SEVERAL_DEVICES = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from cce_numba.jax import linear_cross_entropy

assert jax.device_count() == 2
random = np.random.default_rng(0)
e, c = (jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in ((40, 8), (60, 8)))
targets = jnp.asarray(random.integers(0, 60, 40))
exact, exact_grads = jax.value_and_grad(lambda *x: linear_cross_entropy(*x, targets, filter_eps=None), (0, 1))(e, c)

for kind in AxisType.Auto, AxisType.Explicit:
    mesh = jax.make_mesh((2,), ("data",), axis_types=(kind,))
    shared, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    arrays = jax.device_put(e, shared), jax.device_put(c, whole), jax.device_put(targets, shared)
    for run in linear_cross_entropy, jax.jit(linear_cross_entropy), jax.jit(jax.grad(linear_cross_entropy)):
        try:
            run(*arrays)
        except ValueError as error:
            assert "must be on one device" in str(error) and "jax.shard_map" in str(error), error
        else:
            raise AssertionError("not refused")

    for check_vma in {True, kind == AxisType.Explicit}:  # whether JAX keeps track of what differs between devices

        def sums(e, c, targets):
            loss = linear_cross_entropy(e, c, targets, reduction="sum", filter_eps=None)
            return jax.lax.psum(loss, "data") / jax.lax.psum(jnp.asarray(len(targets), jnp.float32), "data")

        mean = jax.shard_map(sums, mesh=mesh, in_specs=(P("data"), P(), P("data")), out_specs=P(), check_vma=check_vma)
        loss, grads = jax.jit(jax.value_and_grad(mean, (0, 1)))(*arrays)
        assert abs(loss - exact) <= 1e-5 * exact, (kind, check_vma, loss, exact)
        for grad, exact_grad in zip(grads, exact_grads):
            error = np.linalg.norm(grad - exact_grad) / np.linalg.norm(exact_grad)
            assert error <= 1e-5, (kind, check_vma, error)

# Whole arrays on one of several devices.
second = [jax.device_put(x, jax.devices()[1]) for x in (e, c, targets)]
loss = jax.jit(lambda *x: linear_cross_entropy(*x, filter_eps=None))(*second)
assert loss == exact and loss.devices() == {jax.devices()[1]}
"""
EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "jax.md").read_text(), re.DOTALL)
AFTER_THE_FIRST = """
exact, _ = jax.value_and_grad(lambda e, c: linear_cross_entropy(e, c, targets, filter_eps=None), (0, 1))(e, c)
assert abs(loss - exact) <= 1e-6 * exact and d_e.shape == e.shape and abs(d_c).max() > 0
"""
AFTER_THE_SECOND = """
assert jax.device_count() == 2 and len(shared_d_e.sharding.device_set) == 2
assert abs(shared_loss - loss) <= 1e-5 * loss
error = jnp.linalg.norm(shared_d_c - d_c) / jnp.linalg.norm(d_c)
assert error < 0.1, error  # other draws
print("all is well")
"""


def test_shared_arrays_are_refused_and_shard_map_is_the_way_as_the_documentation_has_it(monkeypatch):
    """One process for all: it takes seconds to begin."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    first, second = EXAMPLES
    program = ON_SEVERAL_DEVICES + first + AFTER_THE_FIRST + second + AFTER_THE_SECOND
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "all is well\n", done.stderr
