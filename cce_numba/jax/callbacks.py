"""What runs when XLA comes to a call: Python functions that take XLA's buffers and write their results into XLA's.

`driver.py` computes. XLA holds no lock of its own meanwhile; on a GPU the functions only queue work on XLA's stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental.buffer_callback import buffer_callback

from cce_numba import arguments, driver
from cce_numba.arguments import Ids, Problem
from cce_numba.backend import Gradients, backend_module
from cce_numba.destination import Destination
from cce_numba.driver import ForwardPass
from cce_numba.interchange import Kind
from cce_numba.jax import buffers, state
from cce_numba.plan import Plan

# What a forward returns, in this order; of the last four, those that the options ask for.
RESULTS = ("loss", "logprobs", "lse", "entropy", "sum_squares", "top_logprobs", "top_ids")
_ON_HOST = Kind("jax", None, lambda native: native)


@dataclass(frozen=True)
class Call:
    """What is known of a call when JAX traces it; equal ones are the same program.

    Attributes:
        options: the options that are not arrays, by name, those that are not their defaults.
        of_ids: whether log-probabilities are wanted of "targets", and no loss.
    """

    options: tuple[tuple[str, Any], ...]
    of_ids: bool

    def problem(self, shapes: Mapping[str, Any]) -> Problem:
        """The checked problem, of stand-ins without memory of their own. `shapes`: what has a shape and a dtype, by name.

        Raises what `arguments.problem` does.
        """
        arrays = {name: np.broadcast_to(np.ones((), x.dtype), x.shape) for name, x in shapes.items()}
        e, c, targets, given = self._split(arrays)
        return arguments.problem(e, c, targets, {**given, "check_targets": False}, kind=_ON_HOST)

    @contextmanager
    def prepared(self, context: Any, given: Mapping[str, Any], *, looked: bool) -> Iterator[tuple[Problem, Plan]]:
        """As `driver.prepared`, of XLA's buffers by name; inside, its device and stream are current.

        `looked`: whether targets were checked before.
        """
        kind = buffers.kind_of(given["e"])
        with buffers.current(context, kind):
            e, c, targets, options = self._split({name: buffers.array_of(buffer) for name, buffer in given.items()})
            if looked:
                options["check_targets"] = False
            with driver.prepared(e, c, targets, options, kind=kind) as both:
                yield both

    def _split(self, arrays: Mapping[str, Any]) -> tuple[Any, Any, Any, dict[str, Any]]:
        others = dict(arrays)
        e, c, targets = (others.pop(name) for name in ("e", "c", "targets"))
        # Logits that a forward keeps (`workspace_bytes`) would have to be copied: to the state, which is in XLA's memory.
        return e, c, Ids(targets) if self.of_ids else targets, {**dict(self.options), **others, "workspace_bytes": 0}


@dataclass(frozen=True)
class Forward:
    """`wrt`: the gradients that a backward is to give; None if there will be none, and then nothing is kept for one."""

    call: Call
    wrt: tuple[str, ...] | None

    def __call__(self, context: Any, out: Mapping[str, Any], arrays: Mapping[str, Any]) -> None:
        """Writes the results and the state."""
        wrt = self.wrt or ()
        with self.call.prepared(context, arrays, looked=False) as (problem, plan):
            done = driver.forward(problem, plan, wrt)
            found = done.beside()
            found |= {"logprobs": problem.exported(done.logprobs())} if self.call.of_ids else {"loss": done.loss()}
            for name, buffer in out.items():
                if name == "state":
                    form = backend_module(plan.backend).statistics_form(problem)
                    state.write(buffers.array_of(buffer), problem, form, done.statistics, wrt)
                else:
                    buffers.array_of(buffer)[...] = found[name]


@dataclass(frozen=True)
class Backward:
    """`wrt`: the gradients that the forward was told of."""

    call: Call
    wrt: tuple[str, ...]

    def __call__(
        self, context: Any, out: Mapping[str, Any], arrays: Mapping[str, Any], kept: Any, upstream: Mapping[str, Any]
    ) -> None:
        """Writes the gradients that follow from what flows into the results, `upstream`, by name."""
        with self.call.prepared(context, arrays, looked=True) as (problem, plan):
            form = backend_module(plan.backend).statistics_form(problem)
            statistics = state.read(buffers.array_of(kept), problem, form, self.wrt)
            grads = {name: buffers.array_of(buffer) for name, buffer in out.items()}
            flat = {name: grad.reshape(getattr(problem, name).shape) for name, grad in grads.items()}
            destination = Destination(frozenset(grads), Gradients(**grads), Gradients(**flat), False)
            d = {name: buffers.array_of(buffer) for name, buffer in upstream.items()}
            ForwardPass.of(problem, plan, statistics).backward(
                d.get("loss", 0.0),
                d.get("lse"),
                destination,
                d_logprobs=d.get("logprobs"),
                d_entropy=d.get("entropy"),
            )


def forward(call: Call, arrays: Mapping[str, jax.Array], wrt: Sequence[str] | None) -> dict[str, jax.Array]:
    """Those of `RESULTS` that are asked for, and with `wrt` the array "state", for `backward`.

    Raises what `arguments.problem` does.
    """
    p = call.problem(arrays)
    per_token = p.per_token(np.empty((p.N, 0), np.uint8)).shape[:-1]
    wide, options = p.compute_dtype, p.options
    best = (*per_token, options.top_k)
    forms: dict[str, tuple[tuple[int, ...], Any]] = {"lse": (per_token, wide)}
    if call.of_ids:
        forms["logprobs"] = (p.per_token(p.targets).shape, wide)
    else:
        forms["loss"] = (per_token if options.reduction == "none" else (), wide)
    if options.entropy:
        forms["entropy"] = (per_token, wide)
    if options.sum_squares:
        forms["sum_squares"] = (per_token, wide)
    if options.top_k:
        forms |= {"top_logprobs": (best, wide), "top_ids": (best, jax.dtypes.canonicalize_dtype(np.int64))}
    if wrt is not None:
        forms["state"] = ((state.n_bytes(p, wrt),), np.uint8)
    return _run(Forward(call, None if wrt is None else tuple(wrt)), forms, arrays)


def backward(
    call: Call,
    arrays: Mapping[str, jax.Array],
    kept: jax.Array,
    upstream: Mapping[str, jax.Array],
    wrt: Sequence[str],
) -> dict[str, jax.Array]:
    """The gradients `wrt`, by name. `kept`: the state that a forward left; `upstream`: what flows into its results."""
    forms = {name: (arrays[name].shape, arrays[name].dtype) for name in wrt}
    return _run(Backward(call, tuple(wrt)), forms, arrays, kept, upstream)


def _run(function: Any, forms: Mapping[str, tuple[tuple[int, ...], Any]], *inputs: Any) -> dict[str, jax.Array]:
    """Has XLA call the function, with buffers for results of these shapes and dtypes.

    Under `jax.vmap` one call comes after another. XLA must not record the call in a CUDA graph (`command_buffer_compatible`),
    since memory that CuPy lends for its time would be in it.
    """
    results = {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in forms.items()}
    found = buffer_callback(function, results, vmap_method="sequential")(*inputs)
    return found if (axes := varying_axes(jax.tree.leaves(inputs))) is None else vary(found, axes)


def varying_axes(arrays: Sequence[Any]) -> tuple[str, ...] | None:
    """The axes of a mesh along which an array differs, inside `jax.shard_map`; None if there are none."""
    axes: set[str] = set()
    for array in arrays:
        kind = jax.typeof(array)
        axes |= kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying  # versions differ
    return tuple(sorted(axes)) or None


def vary(arrays: Any, axes: tuple[str, ...]) -> Any:
    """The same arrays, of which JAX then knows that they differ along the axes.

    So the gradient of one that did not, as a classifier that all devices have, is summed over the devices.
    """

    def one(array: Any) -> Any:
        missing = set(axes) - set(varying_axes([array]) or ())
        return jax.lax.pcast(array, tuple(sorted(missing)), to="varying") if missing else array

    return jax.tree.map(one, arrays)
