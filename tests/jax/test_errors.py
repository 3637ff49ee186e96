"""What the adapter refuses, and what it says then."""

from __future__ import annotations

import numpy as np
import pytest

from tests.jax.conftest import make

jax = pytest.importorskip("jax", reason="JAX is not installed")
jnp = pytest.importorskip("jax.numpy")
ccj = pytest.importorskip("cce_numba.jax")


@pytest.fixture(scope="module")
def inputs():
    given = make(0, (6,), 12, 4, "float32")
    return given["e"], given["c"], given["targets"]


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"c": lambda c: c.T}, ValueError, "e: last dimension must be the hidden size"),
        ({"c": lambda c: c.astype("bfloat16")}, TypeError, "c: dtype must be that of e, float32, got bfloat16"),
        ({"e": lambda e: e.astype(int)}, TypeError, "e: dtype must be one of float16, bfloat16, float32, float64"),
        ({"targets": lambda t: t[1:]}, ValueError, "targets: must have the shape of e without its last dimension"),
        ({"targets": lambda t: t * 1.0}, TypeError, "targets: must be integers"),
        ({"bias": lambda _: jnp.ones(3)}, ValueError, r"bias: must have shape \(V,\)"),
        ({"logit_scale": lambda _: jnp.ones(3)}, ValueError, "logit_scale: must be a number or have the shape of e"),
    ],
)
def test_arrays_are_checked_when_jax_traces(inputs, change, kind, message, jitted):
    arrays = dict(zip(("e", "c", "targets"), inputs, strict=True))
    arrays |= {name: of(arrays.get(name)) for name, of in change.items()}
    run = jax.jit(ccj.linear_cross_entropy) if jitted else ccj.linear_cross_entropy
    with pytest.raises(kind, match=message):
        run(**arrays)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"temperature": 2.0}, TypeError, "temperature: is not an option; did you mean 'logit_scale'"),
        ({"accum_c_fp32": True}, TypeError, "accum_c_fp32: means nothing here"),
        ({"workspace_bytes": 1}, TypeError, "workspace_bytes: means nothing here"),
        ({"reduction": "avg"}, ValueError, "reduction: must be one of"),
        ({"backend": "tpu"}, ValueError, "backend: must be one of"),
        ({"softcap": -1.0}, ValueError, "softcap: must be positive"),
        ({"top_k": 13}, ValueError, "top_k: must be at most V = 12"),
        ({"return_lse": 1}, TypeError, "return_lse: must be True or False"),
        ({"token_weights": [1.0]}, TypeError, "token_weights: must be a jax.Array, got builtins.list; pass jax.numpy.asarray"),
    ],
)
def test_options_are_checked(inputs, options, kind, message):
    with pytest.raises(kind, match=message):
        ccj.linear_cross_entropy(*inputs, **options)


def test_an_option_that_must_be_known_may_not_be_traced(inputs):
    with pytest.raises(TypeError, match="softcap: must be known when JAX traces"):
        jax.jit(lambda softcap: ccj.linear_cross_entropy(*inputs, softcap=softcap))(5.0)


def test_other_libraries_arrays_are_sent_elsewhere(inputs):
    tensor = type("Tensor", (), {"__module__": "torch"})()
    with pytest.raises(TypeError, match=r"e: must be a jax.Array, got torch.Tensor; cce_numba.torch has the functions"):
        ccj.linear_cross_entropy(tensor, *inputs[1:])


def test_numpy_s_arrays_are_welcome(inputs):
    assert ccj.linear_cross_entropy(*map(np.asarray, inputs)) == ccj.linear_cross_entropy(*inputs)


@pytest.mark.parametrize("jitted", [False, True])
def test_targets_out_of_range_fail_when_the_program_runs(inputs, jitted):
    run = jax.jit(ccj.linear_cross_entropy) if jitted else ccj.linear_cross_entropy
    # Outside of jit JAX may keep the kind of error, inside it makes one of its own of it.
    with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match=r"targets: must lie in \[0, V\) = \[0, 12\)"):
        jax.block_until_ready(run(inputs[0], inputs[1], inputs[2].at[3].set(12)))
    assert jnp.isfinite(run(*inputs)), "the next call is not touched by that"


def test_a_backend_that_cannot_run_fails_when_the_program_runs(inputs):
    run = jax.jit(lambda *x: ccj.linear_cross_entropy(*x, backend="hopper"))
    with pytest.raises(jax.errors.JaxRuntimeError, match="backend: 'hopper' cannot run this"):
        jax.block_until_ready(run(*inputs))


@pytest.mark.parametrize("name", ["token_weights", "class_weights", "logit_scale"])
def test_a_gradient_of_what_has_none_is_refused(inputs, name):
    e, c, targets = inputs
    x = jnp.ones(12 if name == "class_weights" else 6)

    def loss(x, c):
        return ccj.linear_cross_entropy(e, c, targets, **{name: x})

    with pytest.raises(ValueError, match=rf"{name}: gets no gradient here, .*stop_gradient\({name}\)"):
        jax.jit(jax.grad(loss))(x, c)
    assert jax.grad(loss, argnums=1)(x, c).shape == c.shape
    assert not jax.grad(lambda x: loss(jax.lax.stop_gradient(x), c))(x).any()


def squared(gradient):
    return lambda e: (gradient(e) ** 2).sum()


@pytest.mark.parametrize(
    "twice",
    [
        lambda f: jax.grad(squared(jax.grad(f))),
        lambda f: jax.jit(jax.grad(squared(jax.jit(jax.grad(f))))),
        lambda f: jax.jacrev(jax.grad(f)),
        lambda f: jax.grad(lambda e: jax.value_and_grad(f)(e)[0]),
    ],
    ids=["grad of grad", "under jit", "jacrev", "the value"],
)
def test_second_derivatives_are_refused(inputs, twice):
    e, c, targets = inputs
    with pytest.raises(NotImplementedError, match=r"cce_numba.jax: gradients of the loss have no derivatives"):
        twice(lambda e: ccj.linear_cross_entropy(e, c, targets))(e)


def test_a_gradient_may_stand_inside_what_is_differentiated(inputs):
    e, c, targets = inputs
    gradient = jax.grad(lambda e: ccj.linear_cross_entropy(e, c, targets))
    taken = jax.grad(lambda e: (jax.lax.stop_gradient(gradient(e)) * e).sum())(e)
    np.testing.assert_array_equal(taken, gradient(e))


@pytest.mark.parametrize(
    "forward", [lambda f, e: jax.jvp(f, (e,), (e,)), lambda f, e: jax.hessian(f)(e)], ids=["jvp", "hessian"]
)
def test_forward_mode_is_refused(inputs, forward):
    e, c, targets = inputs
    with pytest.raises(TypeError, match="forward-mode"):
        forward(lambda e: ccj.linear_cross_entropy(e, c, targets), e)
