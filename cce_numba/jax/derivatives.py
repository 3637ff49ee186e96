"""How JAX differentiates a call: backwards, once, with respect to e, c and bias, of which it computes those that are wanted."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from cce_numba.arguments import GRADIENTS
from cce_numba.jax import callbacks
from cce_numba.jax.callbacks import Call

_DIFFERENTIABLE = ("loss", "lse", "logprobs", "entropy")
_INSTEAD = {  # of an array that a gradient is wanted of, what gives one
    "logit_scale": ", or e * logit_scale[..., None] in place of e, which has one (and leaves a bias as it is)",
    "token_weights": ", or multiply the loss of reduction='none' by them, which has one",
}


def apply(call: Call, arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Those of `callbacks.RESULTS` that are asked for, by name, as JAX differentiates them."""
    axes = callbacks.varying_axes(list(arrays.values()))
    return _results(call, dict(arrays) if axes is None else callbacks.vary(dict(arrays), axes))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _results(call: Call, arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return callbacks.forward(call, arrays, None)


def _forward(call: Call, arrays: dict[str, Any]) -> tuple[dict[str, jax.Array], Any]:
    """What `_results` returns, and what `_backward` needs: the arrays, the state, and the names of the gradients."""
    wanted = [name for name, x in arrays.items() if x.perturbed and jnp.issubdtype(x.value.dtype, jnp.floating)]
    for name in wanted:
        if name not in GRADIENTS:
            raise ValueError(
                f"{name}: gets no gradient here, and one is wanted of it; pass jax.lax.stop_gradient({name})"
                f"{_INSTEAD.get(name, '')}"
            )
    values = {name: x.value for name, x in arrays.items()}
    found = _kept_forward((call, tuple(wanted)), values)
    kept = found.pop("state")
    return found, (values, kept, dict.fromkeys(wanted, ()))  # names are no arrays, so they travel as keys


def _backward(call: Call, residuals: Any, d_results: dict[str, Any]) -> tuple[dict[str, Any]]:
    values, kept, wanted = residuals
    upstream = {name: d for name, d in d_results.items() if name in _DIFFERENTIABLE and not isinstance(d, SymbolicZero)}
    grads: dict[str, Any] = dict.fromkeys(values)  # None is a gradient of 0
    if upstream and wanted:
        grads |= _gradients((call, tuple(wanted)), values, kept, upstream)
    return (grads,)


_results.defvjp(_forward, _backward, symbolic_zeros=True)


def _once(function: Any) -> Any:
    """The function, whose first argument is static, with no derivatives of its own.

    It is refused where a derivative would flow, and not before: a gradient may stand inside something that is differentiated,
    with `jax.lax.stop_gradient` around it.
    """
    guarded = jax.custom_vjp(function, nondiff_argnums=(0,))

    def forward(static: Any, *arrays: Any) -> tuple[Any, None]:
        return function(static, *arrays), None

    def backward(static: Any, residuals: None, d_results: Any) -> NoReturn:
        raise NotImplementedError(
            "cce_numba.jax: gradients of the loss have no derivatives (a gradient of a gradient); a loss of stored logits has "
            "them. Nor has the loss that jax.value_and_grad returns beside a gradient: compute it once more, by itself"
        )

    guarded.defvjp(forward, backward)
    return guarded


_kept_forward = _once(lambda of, arrays: callbacks.forward(of[0], arrays, of[1]))
_gradients = _once(lambda of, arrays, kept, upstream: callbacks.backward(of[0], arrays, kept, upstream, of[1]))
