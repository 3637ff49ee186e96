"""What the tests of the JAX adapter share: a problem, and the same loss in JAX's own operations, with stored logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("jax", reason="JAX is not installed")

import jax
import jax.numpy as jnp


@pytest.fixture(scope="session", autouse=True)
def _on_the_cpu() -> Any:
    """Arrays of tests are on the CPU, whatever else there is, unless a test puts them elsewhere."""
    with jax.default_device(jax.devices("cpu")[0]):
        yield


def make(seed: int, shape: tuple[int, ...], V: int, D: int, dtype: Any, ignored: float = 0.0) -> dict[str, Any]:
    """e, c, bias and targets of random numbers, as JAX's arrays; a few entries are likely."""
    random = np.random.default_rng(seed)
    e, c = random.standard_normal((*shape, D)), random.standard_normal((V, D)) * 3 / D**0.5
    targets = np.where(random.random(shape) < ignored, -100, random.integers(0, V, shape))
    floats = {"e": e, "c": c, "bias": random.standard_normal(V)}
    return {name: jnp.asarray(x, dtype) for name, x in floats.items()} | {"targets": jnp.asarray(targets)}


def stored_logits_loss(
    e: Any, c: Any, targets: Any, bias: Any = None, *, softcap: Any = None, z_loss: Any = 0.0, smoothing: Any = 0.0
) -> Any:
    """`(loss, lse)` of the mean over targets that are not -100, in float32."""
    logits = e.astype(jnp.float32) @ c.astype(jnp.float32).T
    if bias is not None:
        logits = logits + bias.astype(jnp.float32)
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    counts = targets != -100
    lse = jnp.where(counts, jax.nn.logsumexp(logits, axis=-1), 0)
    of_target = jnp.take_along_axis(logits, jnp.where(counts, targets, 0)[..., None], axis=-1)[..., 0]
    nll = lse - (1 - smoothing) * of_target - smoothing * logits.mean(axis=-1)
    return jnp.where(counts, nll + z_loss * lse**2, 0).sum() / counts.sum(), lse


def relative(actual: Any, exact: Any) -> float:
    """Frobenius norm of the error, relative; NaN if there is one."""
    actual, exact = np.asarray(actual, np.float64), np.asarray(exact, np.float64)
    assert actual.shape == exact.shape
    assert np.linalg.norm(exact) > 0, "an exact gradient of 0 would judge nothing"
    return float(np.linalg.norm(actual - exact) / np.linalg.norm(exact))
