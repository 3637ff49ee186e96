"""What JAX's users call: `linear_cross_entropy` and `linear_logprobs`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Unpack

import jax

from cce_numba import logprobs
from cce_numba.jax import checks, derivatives
from cce_numba.jax.callbacks import Call
from cce_numba.options import DEFAULTS, LossOptions, flag, unknown
from cce_numba.returned import Logprobs, LossStatistics

# JAX wants gradients of their inputs' dtypes, and what a backward needs in its own memory, so there is nothing to choose.
_NOT_HERE = ("accum_e_fp32", "accum_c_fp32", "workspace_bytes")
OPTIONS = tuple(name for name in DEFAULTS if name not in _NOT_HERE)
_OPTIONS_OF_LOGPROBS = tuple(name for name in logprobs.OPTIONS if name in OPTIONS)
_ARRAYS = ("bias", "class_weights", "token_weights", "target_probs")
_ARRAYS_OR_NUMBERS = ("logit_scale", "filter_seed")


def linear_cross_entropy(
    e: jax.Array, c: jax.Array, targets: jax.Array, *, return_lse: bool = False, **options: Unpack[LossOptions]
) -> Any:
    """Cross-entropy of `softmax(e @ c.T + bias)` with `targets`, which `jax.grad` differentiates, without storing the logits.

    Gradients of any function of loss, lse and entropy flow to e, c and bias, once: there are no second derivatives, and no
    forward mode. It works under `jax.jit`, `jax.checkpoint` and `jax.lax.scan`. Under `jax.vmap` one call comes after another;
    one call with `e` (..., D) is faster. Inside `jax.shard_map` each device computes the loss of its own tokens.

    Args:
        e: (..., D) embeddings: float16, bfloat16, float32 or, with `jax_enable_x64`, float64; on the CPU or an NVIDIA GPU.
        c: (V, D) classifier, of e's dtype.
        targets: (...) integers in [0, V), or `ignore_index`; or (..., K) with `target_probs`.
        return_lse: return `(loss, lse)`.
        options: the others of `cce_numba.linear_cross_entropy`, which says what they mean. `bias`, `class_weights`,
            `token_weights` and `target_probs` are arrays; `logit_scale` and `filter_seed` are arrays or numbers, and an array
            may change from step to step without a new compilation. All others must be known when JAX traces. `accum_e_fp32` and
            `accum_c_fp32` are not among them: a gradient has its input's dtype in JAX. It was summed in float32. Nor is
            `workspace_bytes`: no logits are kept here.
        check_targets: None looks for targets out of range on the CPU alone. What is found there and by True fails when the
            program runs, with JAX's own kind of error around the message; otherwise such a token's loss is NaN.
        backend: "cpu", "simt", "ampere", "hopper", or None to choose by device and dtype when the program runs.

    Returns:
        The loss: 0-d, or for "none" in the shape of `targets[..., shift:]` with 0 where ignored; float32, or float64 for
        float64 inputs. With `entropy`, `sum_squares` or `top_k` a `cce_numba.LossStatistics`.

    Raises:
        TypeError: an argument is no array, or has the wrong dtype.
        ValueError: shapes or option values do not fit; an array lies on several devices; a gradient is wanted of an array that
            has none (pass `jax.lax.stop_gradient` of it).
        NotImplementedError: a gradient is to be differentiated again.

    >>> import jax.numpy as jnp
    >>> e, c = jnp.zeros((2, 3, 4)), jnp.ones((8, 4))
    >>> targets = jnp.array([[1, 2, 3], [4, 5, -100]])
    >>> loss, lse = linear_cross_entropy(e, c, targets, shift=True, return_lse=True)
    >>> round(float(loss), 4), lse.shape
    (2.0794, (2, 2))
    """
    return_lse = flag("return_lse", return_lse)
    found = _found(e, c, targets, options, OPTIONS, of_ids=False)
    if found.keys() > {"loss", "lse"}:
        return LossStatistics(**found)
    return (found["loss"], found["lse"]) if return_lse else found["loss"]


def linear_logprobs(e: jax.Array, c: jax.Array, ids: jax.Array, **options: Unpack[LossOptions]) -> Logprobs:
    """Log-probabilities `log(softmax(e @ c.T + bias))` of each token's ids, which `jax.grad` differentiates.

    Gradients of any function of `logprobs`, `lse` and `entropy` flow to e, c and bias; `sum_squares`, `top_logprobs` and
    `top_ids` have none.

    Args:
        e: (..., D) embeddings, as in `linear_cross_entropy`.
        c: (V, D) classifier.
        ids: (...) integers in [0, V), or (..., K) for several entries of each token; `ignore_index` is padding.
        options: others of `cce_numba.linear_logprobs`, as in `linear_cross_entropy`.

    Returns a `cce_numba.Logprobs` of JAX's arrays, None for what was not asked for. Raises what `linear_cross_entropy` does.

    >>> import jax.numpy as jnp
    >>> found = linear_logprobs(jnp.zeros((2, 4)), jnp.ones((8, 4)), jnp.array([1, 2]), entropy=True)
    >>> [round(float(x), 4) for x in (found.logprobs[0], found.entropy[0])]
    [-2.0794, 2.0794]
    """
    return Logprobs(**_found(e, c, ids, options, _OPTIONS_OF_LOGPROBS, of_ids=True))


def _found(e: Any, c: Any, targets: Any, options: Any, known: Iterable[str], *, of_ids: bool) -> dict[str, jax.Array]:
    """What `derivatives.apply` returns, for arguments as the caller gave them."""
    arrays, others = {"e": e, "c": c, "targets": targets}, {}
    for name, value in options.items():
        if name not in known:
            if name in DEFAULTS:
                raise TypeError(f"{name}: means nothing here; options are {', '.join(known)}")
            raise unknown(name, known)
        if (name in _ARRAYS and value is not None) or (name in _ARRAYS_OR_NUMBERS and hasattr(value, "dtype")):
            arrays[name] = value
        else:
            others[name] = _static(name, value)
    checks.check_backend(others.get("backend"))
    given = tuple(sorted((name, value) for name, value in others.items() if value != DEFAULTS[name]))
    return derivatives.apply(Call(given, of_ids), checks.checked_arrays(arrays))


def _static(name: str, value: Any) -> Any:
    """The value of an option that must be known when JAX traces; raises TypeError, naming it, for an array."""
    if isinstance(value, jax.Array):
        raise TypeError(f"{name}: must be known when JAX traces, not an array, got {value!r}")
    return value.item() if hasattr(value, "item") else value
