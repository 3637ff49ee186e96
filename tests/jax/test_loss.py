"""The adapter's loss and gradients: those of stored logits, and bit for bit those of the functions for arrays."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import cce_numba as cce
import reference
from tests.jax.conftest import make, relative, stored_logits_loss

jax = pytest.importorskip("jax", reason="JAX is not installed")
jnp = pytest.importorskip("jax.numpy")
ccj = pytest.importorskip("cce_numba.jax")

# One rounding to the gradient's dtype; for float32 what sums of float32 lose.
ROUNDING = {"float32": 1e-5, "bfloat16": 2.0**-8, "float16": 2.0**-10}
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "reduction": st.sampled_from(["mean", "sum", "none"]),
        "shift": st.sampled_from([1, True, 2]),
        "softcap": st.just(5.0),
        "logit_scale": st.sampled_from([0.5, "tokens"]),
        "label_smoothing": st.just(0.1),
        "z_loss": st.just(0.01),
        "class_weights": st.just("entries"),
        "token_weights": st.just("tokens"),
        "target_probs": st.just("probs"),
        "entropy": st.just(True),
        "filter": st.just("drop"),
        "filter_eps": st.sampled_from([None, 0.01, 0.3]),
        "filter_seed": st.sampled_from([3, "seed"]),
        "filter_c_grad": st.just(False),
        "batch_invariant": st.just(True),
    },
)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [("float32", {}), ("bfloat16", {"softcap": 5.0}), ("float16", {"z_loss": 0.01}), ("float32", {"label_smoothing": 0.1})],
    ids=str,
)
def test_agrees_with_jax_s_gradient_of_stored_logits(dtype, options):
    given = make(0, (3, 50), 300, 24, dtype, ignored=0.2)
    inputs, targets = (given["e"], given["c"], given["bias"]), given["targets"]

    def ours(e, c, bias):
        loss, lse = ccj.linear_cross_entropy(e, c, targets, bias=bias, return_lse=True, filter_eps=None, **options)
        return loss + 0.001 * (lse**2).sum()

    def exact(e, c, bias):
        renamed = {{"label_smoothing": "smoothing"}.get(name, name): value for name, value in options.items()}
        loss, lse = stored_logits_loss(e, c, targets, bias, **renamed)
        return loss + 0.001 * (lse**2).sum()

    wide = [x.astype(jnp.float32) for x in inputs]
    loss, grads = jax.jit(jax.value_and_grad(ours, argnums=(0, 1, 2)))(*inputs)
    exact_loss, exact_grads = jax.jit(jax.value_and_grad(exact, argnums=(0, 1, 2)))(*wide)
    assert loss.dtype == jnp.float32
    assert abs(loss - exact_loss) <= 1e-5 * abs(exact_loss)
    for grad, x, exact_grad in zip(grads, inputs, exact_grads, strict=True):
        assert grad.dtype == x.dtype
        assert relative(grad, exact_grad) <= ROUNDING[dtype]


@settings(max_examples=20)
@given(
    seed=st.integers(0, 2**16),
    shape=st.sampled_from([(7,), (130,), (2, 4), (1, 3, 5)]),
    V=st.sampled_from([2, 9, 150]),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    ignored=st.sampled_from([0.0, 0.3, 1.0]),
    options=OPTIONS,
    jitted=st.booleans(),
)
def test_gives_the_bits_of_the_functions_for_arrays(seed, shape, V, dtype, ignored, options, jitted):
    """So all options reach them, filters and draws too, and what a forward leaves reaches the backward unchanged."""
    given = make(seed, shape, V, 5, dtype, ignored)
    random = np.random.default_rng(seed)
    options = dict(options)
    assume(options.get("shift", 0) < shape[-1])
    sized = {"tokens": shape, "entries": (V,), "probs": (*shape, 3)}
    for name, value in options.items():
        if isinstance(value, str) and value in sized:
            options[name] = jnp.asarray(random.random(sized[value]) + 0.5, jnp.float32)
        elif value == "seed":
            options[name] = jnp.asarray(12345)
    if "target_probs" in options:
        given["targets"] = jnp.stack([given["targets"], *(jnp.full(shape, x) for x in (1, -100))], axis=-1)
    e, c, targets, bias = given["e"], given["c"], given["targets"], given["bias"]
    arrays = {name: x for name, x in options.items() if isinstance(x, jax.Array)}
    static = {name: x for name, x in options.items() if name not in arrays}

    def ours(e, c, bias, targets, arrays):
        return ccj.linear_cross_entropy(e, c, targets, bias=bias, return_lse=True, **static, **arrays)

    run = jax.jit(ours) if jitted else ours
    found, pullback = jax.vjp(lambda *x: run(*x, targets, arrays), e, c, bias)
    native = {name: np.asarray(x) for name, x in arrays.items()}
    result = cce.forward(*map(np.asarray, (e, c, targets)), bias=np.asarray(bias), **static, **native)
    loss, lse = found[:2]
    np.testing.assert_array_equal(loss, result.loss)
    np.testing.assert_array_equal(lse, result.lse)
    d_loss, d_lse = (jnp.asarray(random.random(x.shape), jnp.float32) for x in (loss, lse))
    upstream = {"d_loss": np.asarray(d_loss), "d_lse": np.asarray(d_lse)}
    if "entropy" in options:
        np.testing.assert_array_equal(found.entropy, result.entropy)
        upstream["d_entropy"] = np.asarray(d_lse)
        cotangent = cce.LossStatistics(d_loss, d_lse, d_lse)
    else:
        cotangent = d_loss, d_lse
    expected = cce.backward(result, **upstream)
    for grad, name in zip(pullback(cotangent), ("e", "c", "bias"), strict=True):
        np.testing.assert_array_equal(np.asarray(grad).view(np.uint8), getattr(expected, name).view(np.uint8), err_msg=name)


@settings(max_examples=8)
@given(seed=st.integers(0, 2**16), shape=st.sampled_from([(9,), (2, 70)]), shift=st.sampled_from([0, 1]))
def test_agrees_with_the_reference(seed, shape, shift):
    given = make(seed, shape, 40, 6, "float32", ignored=0.2)
    e, c, targets, bias = (given[name] for name in ("e", "c", "targets", "bias"))
    options = {"shift": shift, "softcap": 9.0, "z_loss": 0.01, "reduction": "sum"}
    loss, grads = jax.value_and_grad(
        lambda e, c: ccj.linear_cross_entropy(e, c, targets, bias=bias, filter_eps=None, **options), argnums=(0, 1)
    )(e, c)
    arrays = *map(np.asarray, (e, c, targets)), np.asarray(bias)
    exact = reference.forward(*arrays[:3], bias=arrays[3], **options)
    exact_grads = reference.backward(*arrays[:3], bias=arrays[3], **options)
    assume(exact.n_valid)
    assert abs(float(loss) - exact.loss) <= 1e-5 * (1 + abs(exact.loss))
    assert relative(grads[0], exact_grads.e) <= 1e-5
    assert relative(grads[1], exact_grads.c) <= 1e-5


def test_no_tokens():
    given = make(0, (0,), 12, 4, "float32")

    def loss(e, c):
        return ccj.linear_cross_entropy(e, c, given["targets"], reduction="sum")

    value, (d_e, d_c) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(given["e"], given["c"])
    assert value == 0
    assert d_e.shape == (0, 4)
    assert (d_c.shape, float(abs(d_c).max())) == ((12, 4), 0)


def test_float64():
    with jax.enable_x64(True):
        given = make(5, (30,), 50, 6, "float64", ignored=0.2)
        e, c, targets = given["e"], given["c"], given["targets"]
        loss, d_c = jax.value_and_grad(lambda c: ccj.linear_cross_entropy(e, c, targets, filter_eps=None))(c)
        found = ccj.linear_logprobs(e, c, targets, top_k=2)
    arrays = list(map(np.asarray, (e, c, targets)))
    assert (loss.dtype, d_c.dtype, found.top_ids.dtype, targets.dtype) == ("float64", "float64", "int64", "int64")
    assert abs(float(loss) - reference.forward(*arrays).loss) <= 1e-13
    assert relative(d_c, reference.backward(*arrays).c) <= 1e-13


def test_only_the_gradients_that_are_wanted_are_computed(monkeypatch):
    given = make(0, (40,), 60, 8, "float32")
    wrt = []
    backward = ccj.derivatives.callbacks.backward
    monkeypatch.setattr(
        ccj.derivatives.callbacks, "backward", lambda call, *others: (wrt.append(others[-1]), backward(call, *others))[1]
    )
    loss = jax.jit(lambda e, c: ccj.linear_cross_entropy(e, c, given["targets"]))
    both = jax.grad(loss, argnums=(0, 1))(given["e"], given["c"])
    alone = jax.grad(loss)(given["e"], given["c"])
    assert [set(names) for names in wrt] == [{"e", "c"}, {"e"}]
    np.testing.assert_array_equal(alone, both[0])


def test_nothing_is_kept_without_a_gradient(monkeypatch):
    given, kept = make(0, (40,), 60, 8, "float32"), []
    monkeypatch.setattr(ccj.derivatives.callbacks.state, "write", lambda *arguments: kept.append(arguments))
    ccj.linear_cross_entropy(given["e"], given["c"], given["targets"]).block_until_ready()
    assert kept == []


def test_under_checkpoint_and_scan():
    given = make(1, (4, 30), 80, 8, "float32", ignored=0.1)
    e, c, targets = given["e"], given["c"], given["targets"]

    def one(e, c, targets):
        return ccj.linear_cross_entropy(e, c, targets, reduction="sum", filter_eps=None)

    def scanned(e, c):
        step = jax.checkpoint(lambda total, x: (total + one(x[0], c, x[1]), None))
        return jax.lax.scan(step, 0.0, (e, targets))[0]

    loss, grads = jax.jit(jax.value_and_grad(scanned, argnums=(0, 1)))(e, c)
    exact, exact_grads = jax.value_and_grad(one, argnums=(0, 1))(e, c, targets)
    assert abs(loss - exact) <= 1e-5 * exact
    for grad, exact_grad in zip(grads, exact_grads, strict=True):
        assert relative(grad, exact_grad) <= 1e-5


def test_vmap_is_one_call_after_another():
    given = make(2, (3, 20), 50, 8, "float32", ignored=0.1)
    e, c, targets = given["e"], given["c"], given["targets"]
    gradient = jax.value_and_grad(lambda e, c, targets: ccj.linear_cross_entropy(e, c, targets), argnums=(0, 1))
    loss, (d_e, d_c) = jax.jit(jax.vmap(gradient, in_axes=(0, None, 0)))(e, c, targets)
    for n in range(3):
        exact, (exact_e, exact_c) = gradient(e[n], c, targets[n])
        np.testing.assert_array_equal(loss[n], exact)
        np.testing.assert_array_equal(d_e[n], exact_e)
        np.testing.assert_array_equal(d_c[n], exact_c)


def test_a_seed_and_a_scale_may_change_without_a_compilation():
    given, traces = make(3, (150,), 400, 8, "float32"), []

    @jax.jit
    def gradient(e, seed, scale):
        traces.append(None)
        return jax.grad(
            lambda e: ccj.linear_cross_entropy(
                e, given["c"], given["targets"], filter_seed=seed, logit_scale=scale, filter_eps=0.05
            )
        )(e)

    first, other, again = (gradient(given["e"], seed, 1.5) for seed in (1, 2, 1))
    np.testing.assert_array_equal(first, again)
    assert relative(other, first) > 1e-3
    assert len(traces) == 1


@pytest.mark.parametrize("ids", ["one", "several"])
def test_log_probabilities(ids):
    given = make(4, (2, 30), 70, 8, "float32", ignored=0.2)
    e, c, bias, targets = (given[name] for name in ("e", "c", "bias", "targets"))
    if ids == "several":
        targets = jnp.stack([targets, jnp.full(targets.shape, 3)], axis=-1)
    options = {"entropy": True, "sum_squares": True, "top_k": 4}

    def total(e, c, bias):
        found = ccj.linear_logprobs(e, c, targets, bias=bias, filter_eps=None, **options)
        return found.logprobs.sum() + 0.1 * found.entropy.sum() + 0.01 * found.lse.sum(), found

    (_, found), grads = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(e, c, bias)
    arrays = *map(np.asarray, (e, c, targets)), np.asarray(bias)
    expected = cce.linear_logprobs(*arrays[:3], bias=arrays[3], **options)
    for name, array in expected._asdict().items():
        np.testing.assert_array_equal(getattr(found, name), array, err_msg=name)
    upstream = {"d_logprobs": 1.0, "d_entropy": 0.1, "d_lse": 0.01}
    exact = reference.distribution_backward(*arrays[:3], bias=arrays[3], **upstream)
    for grad, name in zip(grads, ("e", "c", "bias"), strict=True):
        assert relative(grad, getattr(exact, name)) <= 1e-5
