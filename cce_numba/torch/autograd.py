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
from cce_numba.torch import call, memory, operators
from cce_numba.torch.call import TENSORS

_PLAIN = (torch.Tensor, torch.nn.Parameter)
_NONE = (None,) * (len(TENSORS) + 2)


def apply(tensors: Sequence[torch.Tensor | None], given: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """`(loss, lse)`, recorded by autograd; lse (N,) is flat, 0 where ignored or shifted away.

    `tensors`: `call.TENSORS`; `given`: the options that are no tensors, by name; defaults may be missing.
    """
    _check_transforms(tensors)
    wrt = call.wanted(tensors)
    if is_watched(tensors):
        return operators.forward(tensors, given, wrt)
    return CutCrossEntropy.apply(*tensors, given, wrt)


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
    def forward(ctx: Any, *inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes `call.TENSORS`, the other options by name, and the names of the gradients that a backward is to give."""
        *tensors, given, wrt = inputs
        with call.prepared(tensors, given) as (problem, plan):
            done = driver.forward(problem, plan, wrt)
            loss, lse = done.loss(), memory.tensor_of(done.statistics.lse)
            if wrt:
                kept = call.Kept.of(problem, plan, done.statistics, wrt)
                ctx.set_materialize_grads(False)
                ctx.save_for_backward(*call.for_backward(tensors), lse, *kept.tensors)
                ctx.given, ctx.plan, ctx.pieces, ctx.wrt = given, plan, kept.pieces, wrt
        return loss, lse

    @staticmethod
    def backward(ctx: Any, d_loss: Any, d_lse: Any) -> tuple[Any, ...]:
        """The gradients of e, c and bias that are needed."""
        names = operators.needed(ctx)
        if not names or (d_loss is None and d_lse is None):
            return _NONE
        all_kept = ctx.saved_tensors
        tensors, (lse, *others) = all_kept[: len(TENSORS)], all_kept[len(TENSORS) :]
        kept = call.Kept(others, ctx.pieces)
        is_recorded = torch.is_grad_enabled()  # for second derivatives
        given = {**ctx.given, "check_targets": False}  # the forward has looked
        if is_recorded or is_watched((d_loss, d_lse, *all_kept)) or _is_batched(d_loss) or _is_batched(d_lse):
            saved = kept.saved(tensors, given, ctx.plan, lse, ctx.wrt)
            grads = operators.backward(saved, tensors, ctx.given, d_loss, d_lse, names)
        else:
            grads = call.gradients_like(tensors, names)
            with call.prepared(tensors, given, ctx.plan) as (problem, plan):
                call.backward(problem, plan, kept.statistics(problem, plan, lse), d_loss, d_lse, grads)
        return *(grads.get(name) for name in TENSORS), None, None
