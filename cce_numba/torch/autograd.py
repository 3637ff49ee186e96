"""How autograd comes to record a call: as a function of its own, or as an operator where something else looks on.

What compiles, exports, transforms or watches a program knows operators alone. Autograd needs none, and for a forward with its
backward on the CPU the host takes some 200 us less without: PyTorch does much around operators that are written in Python.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from cce_numba.torch import call, memory, operators
from cce_numba.torch.call import TENSORS

_PLAIN = (torch.Tensor, torch.nn.Parameter)


def apply(
    e: torch.Tensor, c: torch.Tensor, targets: torch.Tensor, bias: torch.Tensor | None, options: Mapping[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(loss, lse)`, recorded by autograd; lse (N,) is flat, 0 where ignored or shifted away. `options`: all others by name."""
    optional = {name: x for name, x in options.items() if isinstance(x, torch.Tensor)}
    tensors = e, c, targets, bias, *(optional.get(name) for name in TENSORS[4:])
    numbers = {**options, **dict.fromkeys(optional)}
    wrt = call.wanted(tensors)
    if is_watched(tensors):
        return operators.forward(tensors, numbers, wrt)
    return CutCrossEntropy.apply(*tensors, numbers, wrt)


def is_watched(tensors: Iterable[torch.Tensor | None]) -> bool:
    """Whether something besides autograd looks at what becomes of these tensors."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch.jit.is_tracing()
        or any(type(x) not in _PLAIN for x in tensors if x is not None)
    )


class CutCrossEntropy(torch.autograd.Function):
    """The operators' work and derivative; the problem and its plan stay as they are from the forward to the backward."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes `call.TENSORS`, the options that are no tensors, and the names of the gradients that a backward is to give."""
        *tensors, options, wrt = inputs
        e, c, targets = tensors[:3]
        with call.prepared(e, c, targets, call.given(tensors, options)) as (problem, plan):
            loss, arrays = call.forward(problem, plan, wrt)
            lse, *others = (memory.tensor_of(array) for array in (arrays if wrt else arrays[:1]))
        if wrt:
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*tensors, lse, *others)
            # The large ones are for autograd to keep, which frees them, and notices changes. The rest is small.
            ctx.problem, ctx.plan, ctx.options = dataclasses.replace(problem, e=None, c=None), plan, options
        return loss, lse

    @staticmethod
    def backward(ctx: Any, d_loss: Any, d_lse: Any) -> tuple[Any, ...]:
        """The gradients of e, c and bias that are needed."""
        names, grads = operators.needed(ctx), {}
        if names and not (d_loss is None and d_lse is None):
            kept = ctx.saved_tensors
            tensors, saved = kept[: len(TENSORS)], kept[len(TENSORS) :]
            if torch.is_grad_enabled() or is_watched((d_loss, d_lse, *kept)):  # grad is enabled for second derivatives
                results = operators.backward(saved, tensors, ctx.options, d_loss, d_lse, names)
                grads = dict(zip(names, results, strict=True))
            else:
                grads = call.gradients_like(dict(zip(TENSORS, tensors, strict=True)), names)
                with call.resumed(ctx.problem, *tensors[:2]) as problem:
                    call.backward(problem, ctx.plan, saved, d_loss, d_lse, grads)
        return *(grads.get(name) for name in TENSORS), None, None
