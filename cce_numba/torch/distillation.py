"""`linear_distillation` for tensors, recorded by autograd."""

from __future__ import annotations

from typing import Any

import torch

from cce_numba import distillation
from cce_numba.arguments import GRADIENTS
from cce_numba.destination import Destination
from cce_numba.torch import checks


@torch.compiler.disable
def linear_distillation(
    e: torch.Tensor,
    c: torch.Tensor,
    teacher_e: torch.Tensor,
    teacher_c: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    teacher_bias: torch.Tensor | None = None,
    targets: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    """`cce_numba.linear_distillation` with gradients for e, c and bias by autograd; the teacher's tensors get none.

    Tensors are on the CPU (backend "cpu") or on a GPU ("hopper" or "simt"). Under autocast both heads are cast, as by
    `linear_cross_entropy`. Compilers do not look into it: a compiled program breaks here, so `fullgraph=True` refuses it.

    Args:
        e, c, bias: the student's, as in `linear_cross_entropy`.
        teacher_e, teacher_c, teacher_bias: the teacher's. They need not be detached, and get no gradient.
        targets: (...) integers that say which tokens are ignored.
        options: kind, beta, temperature, softcap, teacher_softcap, ignore_index, shift, reduction, filter, filter_eps,
            filter_seed, backend of `cce_numba.linear_distillation`.

    Returns the loss, and raises what that function does.

    >>> c, teacher_c = torch.zeros(2, 1, requires_grad=True), torch.tensor([[0.25], [0.75]]).log()
    >>> linear_distillation(torch.ones(1, 1), c, torch.ones(1, 1), teacher_c).backward()
    >>> c.grad.round(decimals=3).tolist()
    [[0.25], [-0.25]]
    """
    teacher_e, teacher_c = teacher_e.detach(), teacher_c.detach()
    teacher_bias = None if teacher_bias is None else teacher_bias.detach()
    mask = torch.zeros((), dtype=torch.int64, device=e.device) if targets is None else targets
    checks.check_tensors(e, c, mask, {"bias": bias})
    checks.check_tensors(teacher_e, teacher_c, mask, {"bias": teacher_bias})
    e, c, bias = checks.cast(e, c, bias)
    teacher_e, teacher_c, teacher_bias = checks.cast(teacher_e, teacher_c, teacher_bias)
    return _LinearDistillation.apply(e, c, bias, teacher_e, teacher_c, teacher_bias, targets, options)


class _LinearDistillation(torch.autograd.Function):
    """Goes forward, keeps what the heads' forwards found, and computes a block of both heads again in the backward."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> torch.Tensor:
        """Takes e, c, bias, then the teacher's, targets and the options."""
        e, c, bias, teacher_e, teacher_c, teacher_bias, targets, options = inputs
        given = {"bias": bias, "teacher_bias": teacher_bias, "targets": targets}
        given = {name: x for name, x in given.items() if x is not None} | options
        with distillation.prepared(e, c, teacher_e, teacher_c, given) as heads:
            done = distillation.forward(heads, _names(ctx))
            loss = done.loss()
        ctx.save_for_backward(e, c, bias, teacher_e, teacher_c, teacher_bias)  # so that changes in place are noticed
        ctx.done = done
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_loss: Any) -> tuple[Any, ...]:
        """The gradients that are needed."""
        _ = ctx.saved_tensors
        problem = ctx.done.heads.student
        with problem.kind.current():
            grads = ctx.done.backward(d_loss, Destination.of(None, False, _names(ctx), problem))
        return grads.e, grads.c, grads.bias, *[None] * 5


def _names(ctx: Any) -> frozenset[str]:
    """Of the gradients that are needed."""
    return frozenset(name for name, needed in zip(GRADIENTS, ctx.needs_input_grad, strict=False) if needed)
