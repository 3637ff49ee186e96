"""How autograd comes to record a call: as a function of its own, or as an operator where something else looks on.

What compiles, exports, transforms or watches a program knows operators alone. Autograd needs none, and for a forward with its
backward on the CPU the host takes some 200 us less without: PyTorch does much around operators that are written in Python.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch.autograd import forward_ad

from cce_numba import driver
from cce_numba.ranks import Sharing
from cce_numba.torch import call, memory, operators
from cce_numba.torch.call import TENSORS, Outputs, Upstream

_PLAIN = (torch.Tensor, torch.nn.Parameter)
_NONE = (None,) * (len(TENSORS) + 3)


def apply(tensors: Sequence[torch.Tensor | None], given: Mapping[str, Any], sharing: Sharing | None = None) -> Outputs:
    """What was asked for, recorded by autograd; all but the loss is flat, (N, ...), 0 where ignored or shifted away.

    `tensors`: `call.TENSORS`; `given`: the options that are no tensors, by name; defaults may be missing. `sharing`: how ranks
    share the work, if they do. Operators know no communicators, so a compiler leaves its program for such a call.
    """
    _check_transforms(tensors)
    wrt = call.wanted(tensors)
    if sharing is not None:
        return _apply_on_ranks(tensors, given, wrt, sharing)
    if is_watched(tensors):
        return operators.forward(tensors, given, wrt)
    return Outputs(*CutCrossEntropy.apply(*tensors, given, wrt, None))


@torch.compiler.disable
def _apply_on_ranks(
    tensors: Sequence[torch.Tensor | None], given: Mapping[str, Any], wrt: list[str], sharing: Sharing
) -> Outputs:
    sharing.said["gradients"] = wrt
    return Outputs(*CutCrossEntropy.apply(*tensors, given, wrt, sharing))


def is_watched(tensors: Iterable[torch.Tensor | None]) -> bool:
    """Whether something besides autograd looks at what becomes of these tensors, or nothing is to be computed."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch.jit.is_tracing()
        or any(type(x) not in _PLAIN or x.is_meta for x in tensors if x is not None)
    )


def _is_batched(gradient: torch.Tensor | None) -> bool:
    """Whether it stands for several upstream gradients, as `is_grads_batched` and `vectorize` make one."""
    return gradient is not None and torch._C._functorch.is_legacy_batchedtensor(gradient)


def _check_transforms(tensors: Iterable[torch.Tensor | None]) -> None:
    """That neither `torch.func` nor forward mode differentiates: they take an operator for a constant, or fail obscurely."""
    if torch.compiler.is_compiling():
        return
    recorded = torch._C._are_functorch_transforms_active() and torch.is_grad_enabled()
    if recorded and any(x.requires_grad for x in tensors if x is not None):
        _refuse_transform()
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors if x is not None):
        _refuse_transform()


def _refuse_transform() -> NoReturn:
    raise NotImplementedError(
        "cce_numba.torch.linear_cross_entropy: torch.func cannot differentiate it, nor forward mode (vmap works); take "
        "torch.autograd, or impl='torch_compile', which stores the logits"
    )


class CutCrossEntropy(torch.autograd.Function):
    """The operators' work and derivative. What a backward needs is autograd's to keep: it frees it, and notices changes."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[torch.Tensor | None, ...]:
        """Takes `call.TENSORS`, the other options by name, the names of the gradients that a backward is to give, `Sharing`."""
        *tensors, given, wrt, sharing = inputs
        with call.prepared(tensors, given, sharing=sharing) as (problem, plan, together):
            done = driver.forward(problem, plan, wrt, together)
            found = done.statistics
            of_tokens = found.lse, None if problem.has_loss else done.logprobs(), found.entropy
            without_gradient = call.without_gradient(done)
            loss, kept = done.loss(), call.Kept.of(problem, plan, found, wrt) if wrt else None
            lse, logprobs, entropy, *others = (
                None if array is None else memory.tensor_of(array) for array in (*of_tokens, *without_gradient)
            )
        if kept is not None:
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(*(x for x in others if x is not None))
            ctx.save_for_backward(*call.for_backward(tensors), lse, *kept.tensors)
            ctx.given, ctx.plan, ctx.pieces, ctx.wrt, ctx.sharing = given, plan, kept.pieces, wrt, sharing
            ctx.agreed = None if together is None else together.agreed
        return loss, lse, logprobs, entropy, *others

    @staticmethod
    def backward(ctx: Any, *d_outputs: Any) -> tuple[Any, ...]:
        """The gradients of e, c and bias that are needed."""
        names, upstream = operators.needed(ctx), Upstream(*d_outputs[: len(Upstream._fields)])
        if not names or upstream.is_nothing():
            return _NONE
        all_kept = ctx.saved_tensors
        tensors, (lse, *others) = all_kept[: len(TENSORS)], all_kept[len(TENSORS) :]
        kept = call.Kept(others, ctx.pieces)
        is_recorded = torch.is_grad_enabled()  # for second derivatives
        given = {**ctx.given, "check_targets": False}  # the forward has looked
        if ctx.sharing is not None and (is_recorded or any(map(_is_batched, upstream))):
            raise NotImplementedError(
                "cce_numba.torch.linear_cross_entropy: on several ranks its gradients have no derivatives, and one upstream "
                "gradient at a time"
            )
        if ctx.sharing is None and (is_recorded or is_watched((*upstream, *all_kept)) or any(map(_is_batched, upstream))):
            saved = kept.saved(tensors, given, ctx.plan, lse, ctx.wrt)
            grads = operators.backward(saved, tensors, ctx.given, upstream, names)
        else:
            grads = call.gradients_like(tensors, names)
            with call.prepared(tensors, given, ctx.plan, ctx.sharing, ctx.agreed) as (problem, plan, together):
                call.backward(problem, plan, kept.statistics(problem, plan, lse), upstream, grads, together)
        return *(grads.get(name) for name in TENSORS), None, None, None
