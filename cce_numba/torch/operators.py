"""The two operators that PyTorch sees, `cce_numba::linear_cross_entropy` and `cce_numba::linear_cross_entropy_backward`.

Operators take and give tensors and plain values only, and their results' shapes must follow from their arguments' shapes. So
the backward makes the checked problem and the plan again, which costs the host some microseconds and the device nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from cce_numba.arguments import GRADIENTS
from cce_numba.options import DEFAULTS
from cce_numba.torch import call, fakes, memory
from cce_numba.torch.call import MORE, SAVED, TENSORS, Outputs, Upstream

# Options travel in a few lists, since PyTorch takes time for each argument: None as nan, -1 or "", by place. A threshold is
# either a number or a word.
_FLAGS = ("filter_e_grad", "filter_c_grad", "entropy", "sum_squares", "batch_invariant", "allow_tf32")
_INTEGERS = ("ignore_index", "shift", *_FLAGS, "top_k", "workspace_bytes", "check_targets")
_REALS = ("softcap", "filter_eps", "logit_scale", "label_smoothing", "z_loss")
_WORDS = ("reduction", "backend", "filter", "filter_eps")
_INPUTS = ", ".join(["Tensor e, Tensor c, Tensor targets", *(f"Tensor? {name}" for name in TENSORS[3:])])
# A compiler would make one program for each value of a number in a list, and gives up after a few. So those that it has left
# open travel in a tensor: `open_reals`, float64 on the CPU; the last of `words` names them.
_OPTIONS = "int[] integers, float[] reals, Tensor? open_reals, str words"
# Which of the forward's results have gradients, by their places: the loss, and then those of SAVED and MORE.
_RESULTS = ("loss", *SAVED, *MORE)
_WITH_GRADIENT = tuple(_RESULTS.index(name) for name in Upstream._fields)
_UPSTREAM = ", ".join(f"Tensor? d_{name}" for name in Upstream._fields)
_ANY_REAL = 0.5  # what stands for one that is open where no values are known: all of them have other effects than None or 0


def forward(tensors: Sequence[torch.Tensor | None], given: Mapping[str, Any], wrt: Iterable[str]) -> Outputs:
    """`Outputs` by the operator, which autograd records.

    `tensors`: `call.TENSORS`; `given`: other options by name; `wrt`: the gradients that a backward is to give.
    """
    found = dict(zip(_RESULTS, forward_op(*tensors, *_encoded(given), ",".join(wrt)), strict=True))
    asked = {
        "loss": True,
        "lse": True,
        "logprobs": given.get("reduction") == call.LOGPROBS,
        "entropy": given.get("entropy"),
        "sum_squares": given.get("sum_squares"),
        "top_logprobs": given.get("top_k"),
        "top_ids": given.get("top_k"),
    }
    return Outputs(**{name: found[name] if is_asked else None for name, is_asked in asked.items()})


def backward(
    saved: Sequence[torch.Tensor],
    tensors: Sequence[torch.Tensor | None],
    given: Mapping[str, Any],
    upstream: Upstream,
    names: Iterable[str],
) -> dict[str, torch.Tensor]:
    """The gradients that are named, by the operator, which autograd records: to refuse second derivatives."""
    results = backward_op(*upstream, *saved, *call.for_backward(tensors), *_encoded(given), ",".join(names))
    return {name: grad for name, grad in zip(GRADIENTS, results, strict=True) if name in names}


def needed(ctx: Any) -> list[str]:
    """Which gradients autograd asks for, of a context whose inputs begin with `call.TENSORS`."""
    return [name for name in GRADIENTS if ctx.needs_input_grad[TENSORS.index(name)]]


def _encoded(given: Mapping[str, Any]) -> tuple[list[int], list[float], torch.Tensor | None, str]:
    """The options that are no tensors, as operators take them."""
    options = {**DEFAULTS, **given}
    look, eps, room = options["check_targets"], options["filter_eps"], options["workspace_bytes"]
    numbers = {**options, "workspace_bytes": -1 if room is None else room, "check_targets": -1 if look is None else look}
    numbers |= {"filter_eps": None if isinstance(eps, str) else eps}
    left_open = [name for name in _REALS if _is_open(numbers[name])]
    open_reals = None
    if left_open:  # products, which compilers know to make without the number's value
        one = torch.ones((), dtype=torch.float64, device="cpu")
        open_reals = torch.stack([one * numbers[name] for name in left_open])
    words = options["reduction"], options["backend"] or "", options["filter"], eps if isinstance(eps, str) else ""
    return (
        [int(numbers[name]) for name in _INTEGERS],
        [math.nan if numbers[name] is None or name in left_open else float(numbers[name]) for name in _REALS],
        open_reals,
        ",".join([*words, "+".join(left_open)]),
    )


def _is_open(number: Any) -> bool:
    """Whether a compiler has a symbol for the number."""
    if number is None or not torch.compiler.is_compiling():
        return False
    return not torch.fx.experimental.symbolic_shapes.has_static_value(number)


def _decoded(
    integers: list[int], reals: list[float], open_reals: torch.Tensor | None, words: str, *, known: bool = True
) -> dict[str, Any]:
    """What `_encoded` was made of, by name, defaults included. `known`: whether `open_reals` has values to be read."""
    *plain_words, left_open = words.split(",")
    options: dict[str, Any] = dict(zip(_INTEGERS, integers, strict=True))
    options |= {name: bool(options[name]) for name in _FLAGS}
    options["workspace_bytes"] = None if options["workspace_bytes"] < 0 else options["workspace_bytes"]
    options["check_targets"] = None if options["check_targets"] < 0 else bool(options["check_targets"])
    options |= {name: None if real != real else real for name, real in zip(_REALS, reals, strict=True)}
    options |= {name: word for name, word in zip(_WORDS, plain_words, strict=True) if word}
    if open_reals is not None:
        names = left_open.split("+")
        options |= zip(names, open_reals.tolist() if known else [_ANY_REAL] * len(names), strict=True)
    return options


@torch.library.custom_op(
    "cce_numba::linear_cross_entropy",
    mutates_args=(),
    schema=f"({_INPUTS}, {_OPTIONS}, str wrt) -> ({', '.join(['Tensor'] * len(_RESULTS))})",
)
def forward_op(*arguments: Any) -> tuple[torch.Tensor, ...]:
    """`call.forward`; `wrt`: the names of the gradients that a backward is to give, separated by commas."""
    tensors, (*options, wrt) = arguments[: len(TENSORS)], arguments[len(TENSORS) :]
    with call.prepared(tensors, call.given(_decoded(*options))) as (problem, plan, _):
        loss, arrays, more = call.forward(problem, plan, wrt.split(","))
        empty = arrays[0][:0]
        return loss, *memory.tensors_of((*call.defined(problem, arrays), *(empty if x is None else x for x in more)))


@torch.library.custom_op(
    "cce_numba::linear_cross_entropy_backward",
    mutates_args=(),
    schema=f"({_UPSTREAM}, {', '.join(f'Tensor {name}' for name in SAVED)}, {_INPUTS}, {_OPTIONS}, str wrt) "
    f"-> ({', '.join(['Tensor'] * len(GRADIENTS))})",
)
def backward_op(*arguments: Any) -> tuple[torch.Tensor, ...]:
    """`call.backward`; `wrt`: the names of the gradients, separated by commas. The others that it returns are empty."""
    upstream, saved, tensors, (*options, wrt) = _split(arguments)
    given = call.given(_decoded(*options)) | {"check_targets": False}  # the forward has looked
    grads = call.gradients_like(tensors, wrt.split(","))
    with call.prepared(tensors, given) as (problem, plan, _):
        call.backward(problem, plan, call.statistics(problem, plan, saved), upstream, grads)
    return _all_of(grads, tensors)


def _split(arguments: Sequence[Any]) -> tuple[Upstream, Sequence[Any], Sequence[Any], Sequence[Any]]:
    """The backward's arguments: the upstream gradients, `call.SAVED`, `call.TENSORS`, and the rest."""
    first = len(Upstream._fields)
    second, third = first + len(SAVED), first + len(SAVED) + len(TENSORS)
    return Upstream(*arguments[:first]), arguments[first:second], arguments[second:third], arguments[third:]


def _all_of(grads: Mapping[str, torch.Tensor], tensors: Sequence[torch.Tensor | None]) -> tuple[torch.Tensor, ...]:
    """With an empty tensor for each gradient that is not there: those who batch an operator want tensors alone."""
    e = tensors[0]
    assert e is not None, "the first of TENSORS is never None"
    return tuple(grads[name] if name in grads else e.new_empty(0) for name in GRADIENTS)


@forward_op.register_fake
def _(*arguments: Any) -> tuple[torch.Tensor, ...]:
    (e, c, targets, bias, *_), (*options, wrt) = arguments[: len(TENSORS)], arguments[len(TENSORS) :]
    return fakes.forward(e, c, targets, bias, _decoded(*options, known=False), wrt.split(","))


@backward_op.register_fake
def _(*arguments: Any) -> tuple[torch.Tensor, ...]:
    _, _, tensors, (*_, wrt) = _split(arguments)
    return _all_of(call.gradients_like(tensors, wrt.split(",")), tensors)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    *tensors, integers, reals, open_reals, words, _ = inputs
    options = _decoded(integers, reals, open_reals, words, known=False)
    absent = {"logprobs": options["reduction"] != call.LOGPROBS, "entropy": not options["entropy"]}
    with_gradient = [_RESULTS.index(name) for name in Upstream._fields if not absent.get(name)]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*(x for place, x in enumerate(output) if place not in with_gradient))
    ctx.save_for_backward(*output[1 : 1 + len(SAVED)], *call.for_backward(tensors), open_reals)
    ctx.options, ctx.with_gradient = (integers, reals, words), with_gradient


def _vector_jacobian_product(ctx: Any, *d_results: Any) -> tuple[Any, ...]:
    names, upstream = (
        needed(ctx),
        Upstream(*(d_results[place] if place in ctx.with_gradient else None for place in _WITH_GRADIENT)),
    )
    grads: dict[str, torch.Tensor] = {}
    if names and not upstream.is_nothing():
        *kept, open_reals = ctx.saved_tensors
        integers, reals, words = ctx.options
        results = backward_op(*upstream, *kept, integers, reals, open_reals, words, ",".join(names))
        grads = {name: grad for name, grad in zip(GRADIENTS, results, strict=True) if name in names}
    return *(grads.get(name) for name in TENSORS), *[None] * 5


def _no_second_derivatives(ctx: Any, *unused: Any) -> None:
    raise NotImplementedError(
        "cce_numba.torch.linear_cross_entropy: its gradients have no derivatives (double backward); "
        "impl='torch_compile', which stores the logits, has them"
    )


forward_op.register_autograd(_vector_jacobian_product, setup_context=_setup_context)
backward_op.register_autograd(_no_second_derivatives)


@register_flop_formula(torch.ops.cce_numba.linear_cross_entropy)
def _forward_flops(e_shape: Sequence[int], c_shape: Sequence[int], *others: Any, **named: Any) -> int:
    """The product that makes the logits, as of two matrices."""
    return 2 * math.prod(e_shape) * c_shape[0]


@register_flop_formula(torch.ops.cce_numba.linear_cross_entropy_backward)
def _backward_flops(*arguments: Any, **named: Any) -> int:
    """The logits again, and a product for each gradient of e and c; of all entries, since nobody knows how many survive."""
    _, _, shapes, options = _split(arguments)
    products = 1 + len({"e", "c"}.intersection(options[-1].split(",")))
    return products * _forward_flops(*shapes)
