"""The paper's own kernels, the package `cut_cross_entropy`, which is not required. Imports PyTorch."""

from __future__ import annotations

import torch

from benchmarks.training.trainer import Criterion

EPS_SHARE = 1 / 32  # its threshold, in units of finfo(dtype).eps: 2^-12 for bfloat16


def why_none(device: str) -> str | None:
    """Why it cannot run on a device of this type, or None if it can."""
    if device != "cuda":
        return "its kernels need a GPU"
    try:
        import cut_cross_entropy  # noqa: F401
    except ImportError as error:
        return f"cannot be imported: {error}"
    return None


def loss(impl: str = "cce") -> Criterion:
    """Its mean loss of e (..., D), c (V, D), both of 16 bits, and targets (...); impl: "cce_exact" filters nothing."""
    from cut_cross_entropy import linear_cross_entropy

    def criterion(e: torch.Tensor, c: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy(e, c, targets, impl=impl)

    return criterion
