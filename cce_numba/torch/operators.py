"""The two operators that PyTorch sees, `cce_numba::linear_cross_entropy` and `cce_numba::linear_cross_entropy_backward`.

Operators take and give tensors and plain values only, and their results' shapes must follow from their arguments' shapes. So
the backward makes the checked problem and the plan again, which costs the host some microseconds and the device nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

from cce_numba.arguments import GRADIENTS
from cce_numba.torch import call, fakes, memory
from cce_numba.torch.call import SAVED, TENSORS

# Options travel in a few lists, since PyTorch takes time for each argument: None as nan, -1 or "", by place. A threshold is
# either a number or a word.
_INTEGERS = ("ignore_index", "shift", "filter_e_grad", "filter_c_grad", "check_targets")
_REALS = ("softcap", "filter_eps", "logit_scale", "label_smoothing", "z_loss")
_WORDS = ("reduction", "backend", "filter_eps")
_INPUTS = ", ".join(["Tensor e, Tensor c, Tensor targets", *(f"Tensor? {name}" for name in TENSORS[3:])])
_OPTIONS = "int[] integers, float[] reals, str words"


def forward(
    tensors: Sequence[torch.Tensor | None], options: Mapping[str, Any], wrt: Iterable[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(loss, lse)` by the operator, which autograd records.

    `tensors`: `call.TENSORS`; `options`: all others by name; `wrt`: the gradients that a backward is to give.
    """
    _check_transforms(tensors)
    loss, lse, *_ = forward_op(*tensors, *_encoded(options), ",".join(wrt))
    return loss, lse


def backward(
    saved: Sequence[torch.Tensor],
    tensors: Sequence[torch.Tensor | None],
    options: Mapping[str, Any],
    d_loss: torch.Tensor | None,
    d_lse: torch.Tensor | None,
    names: Iterable[str],
) -> list[torch.Tensor]:
    """The gradients that are named, by the operator, which autograd records: to refuse second derivatives."""
    return backward_op(d_loss, d_lse, *saved, *tensors, *_encoded(options), ",".join(names))


def needed(ctx: Any) -> list[str]:
    """Which gradients autograd asks for, of a context whose inputs begin with `call.TENSORS`."""
    return [name for name in GRADIENTS if ctx.needs_input_grad[TENSORS.index(name)]]


def _check_transforms(tensors: Iterable[torch.Tensor | None]) -> None:
    """That neither `torch.func` nor forward mode differentiates: they take an operator for a constant, or fail obscurely."""
    if torch.compiler.is_compiling():
        return
    given = [x for x in tensors if x is not None]
    recorded = torch._C._are_functorch_transforms_active() and torch.is_grad_enabled() and any(x.requires_grad for x in given)
    if recorded or any(forward_ad.unpack_dual(x).tangent is not None for x in given):
        raise NotImplementedError(
            "cce_numba.torch.linear_cross_entropy: torch.func cannot differentiate it, nor forward mode (vmap works); take "
            "torch.autograd, or impl='torch_compile', which stores the logits"
        )


def _encoded(options: Mapping[str, Any]) -> tuple[list[int], list[float], str]:
    """The options that are no tensors, as operators take them."""
    look, eps = options["check_targets"], options["filter_eps"]
    numbers = {**options, "check_targets": -1 if look is None else look, "filter_eps": None if isinstance(eps, str) else eps}
    return (
        [int(numbers[name]) for name in _INTEGERS],
        [math.nan if numbers[name] is None else float(numbers[name]) for name in _REALS],
        f"{options['reduction']},{options['backend'] or ''},{eps if isinstance(eps, str) else ''}",
    )


def _decoded(integers: list[int], reals: list[float], words: str) -> dict[str, Any]:
    """What `_encoded` was made of, by name."""
    options: dict[str, Any] = dict(zip(_INTEGERS, integers, strict=True))
    options |= {name: bool(options[name]) for name in ("filter_e_grad", "filter_c_grad")}
    options["check_targets"] = None if options["check_targets"] < 0 else bool(options["check_targets"])
    options |= {name: None if real != real else real for name, real in zip(_REALS, reals, strict=True)}
    return options | {name: word for name, word in zip(_WORDS, words.split(","), strict=True) if word}


@torch.library.custom_op(
    "cce_numba::linear_cross_entropy",
    mutates_args=(),
    schema=f"({_INPUTS}, {_OPTIONS}, str wrt) -> ({', '.join(['Tensor'] * (1 + len(SAVED)))})",
)
def forward_op(e: torch.Tensor, c: torch.Tensor, targets: torch.Tensor, *other: Any) -> tuple[torch.Tensor, ...]:
    """`call.forward`; `wrt`: the names of the gradients that a backward is to give, separated by commas."""
    *tensors, integers, reals, words, wrt = other
    given = call.given((e, c, targets, *tensors), _decoded(integers, reals, words))
    with call.prepared(e, c, targets, given) as (problem, plan):
        loss, arrays = call.forward(problem, plan, wrt.split(","))
        return loss, *memory.tensors_of(call.defined(problem, arrays))


@torch.library.custom_op(
    "cce_numba::linear_cross_entropy_backward",
    mutates_args=(),
    schema=f"(Tensor? d_loss, Tensor? d_lse, {', '.join(f'Tensor {name}' for name in SAVED)}, {_INPUTS}, {_OPTIONS}, str wrt) "
    "-> Tensor[]",
)
def backward_op(d_loss: torch.Tensor | None, d_lse: torch.Tensor | None, *other: Any) -> list[torch.Tensor]:
    """`call.backward`; `wrt`: the names of the gradients, separated by commas."""
    saved, (e, c, targets, *tensors, integers, reals, words, wrt) = other[: len(SAVED)], other[len(SAVED) :]
    options = _decoded(integers, reals, words) | {"check_targets": False}  # the forward has looked
    grads = call.gradients_like({"e": e, "c": c, "bias": tensors[0]}, wrt.split(","))
    with call.prepared(e, c, targets, call.given((e, c, targets, *tensors), options)) as (problem, plan):
        call.backward(problem, plan, saved, d_loss, d_lse, grads)
    return list(grads.values())


@forward_op.register_fake
def _(e: torch.Tensor, c: torch.Tensor, targets: torch.Tensor, *other: Any) -> tuple[torch.Tensor, ...]:
    bias, *_, integers, reals, words, wrt = other
    return fakes.forward(e, c, targets, bias, _decoded(integers, reals, words), wrt.split(","))


@backward_op.register_fake
def _(d_loss: torch.Tensor | None, d_lse: torch.Tensor | None, *other: Any) -> list[torch.Tensor]:
    e, c, _, bias, *_, wrt = other[len(SAVED) :]
    return list(call.gradients_like({"e": e, "c": c, "bias": bias}, wrt.split(",")).values())


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    *tensors, integers, reals, words, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(*output[1:], *tensors)
    ctx.options = integers, reals, words


def _vector_jacobian_product(ctx: Any, d_loss: Any, d_lse: Any, *unused: Any) -> tuple[Any, ...]:
    names, grads = needed(ctx), {}
    if names and not (d_loss is None and d_lse is None):
        results = backward_op(d_loss, d_lse, *ctx.saved_tensors, *ctx.options, ",".join(names))
        grads = dict(zip(names, results, strict=True))
    return *(grads.get(name) for name in TENSORS), *[None] * (len(ctx.options) + 1)


def _no_second_derivatives(ctx: Any, *unused: Any) -> None:
    raise NotImplementedError(
        "cce_numba.torch.linear_cross_entropy: its gradients have no derivatives (double backward); "
        "impl='torch_compile', which stores the logits, has them"
    )


forward_op.register_autograd(_vector_jacobian_product, setup_context=_setup_context)
backward_op.register_autograd(_no_second_derivatives)
