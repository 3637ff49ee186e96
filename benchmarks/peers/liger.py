"""Liger's kernel for loss and entropy on Hopper GPUs: the package `liger_kernel`, which is not required. Imports PyTorch."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.measure.device import Call


def why_none() -> str | None:
    """Why it cannot run on this machine, or None if nothing is known against it."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        return "is for GPUs of compute capability 9.0 alone"
    try:
        from liger_kernel.ops import fused_linear_scaled_cross_entropy  # noqa: F401
    except Exception as error:  # a package that is installed may fail in many ways
        return f"cannot be imported: {error!r}"
    return None


def with_entropy(e: torch.Tensor, c: torch.Tensor, targets: torch.Tensor, bonus: float) -> Call:
    """The call that makes the gradients of the mean loss less `bonus` times the mean entropy, and returns that of e (N, D)."""
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    e, c = (x.clone().requires_grad_() for x in (e, c))

    def call() -> Any:
        e.grad = c.grad = None
        nll, entropy = LigerFusedLinearScaledCrossEntropyFunction.apply(e, c, targets, return_entropy=True)
        ((nll - bonus * entropy).sum() / len(e)).backward()
        return e.grad

    return call
