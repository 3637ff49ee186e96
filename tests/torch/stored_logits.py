"""The same loss in PyTorch's own operations, with stored logits: what the adapter is compared with."""

from __future__ import annotations

from typing import Any


def stored_logits_loss(
    e: Any,
    c: Any,
    targets: Any,
    bias: Any = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    reduction: str = "mean",
    shift: int | bool = 0,
    logit_scale: Any = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    class_weights: Any = None,
    token_weights: Any = None,
) -> tuple[Any, Any]:
    """`(loss, lse)`, differentiable. Weights of the tokens multiply what `F.cross_entropy` makes of each."""
    import torch
    from torch.nn import functional as F

    scale = torch.as_tensor(1.0 if logit_scale is None else logit_scale, dtype=e.dtype).expand(targets.shape)
    weights = torch.ones(targets.shape, dtype=e.dtype) if token_weights is None else token_weights.to(e.dtype)
    if shift := int(shift):
        length = max(0, targets.shape[-1] - shift)
        e, scale, targets, weights = e[..., :length, :], scale[..., :length], targets[..., shift:], weights[..., shift:]
    logits = e @ c.T
    if bias is not None:
        logits = logits + bias
    logits = logits * scale[..., None]
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    flat, counts = logits.reshape(-1, len(c)), targets != ignore_index
    per_token = F.cross_entropy(
        flat,
        targets.reshape(-1),
        weight=class_weights,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="none",
    ).reshape(targets.shape)
    lse = torch.where(counts, logits.logsumexp(-1), 0)
    loss = weights * (per_token + z_loss * lse * lse)
    if reduction == "none":
        return loss, lse
    if reduction == "sum":
        return loss.sum(), lse
    of_target = 1 if class_weights is None else class_weights[torch.where(counts, targets, 0)]
    return loss.sum() / (counts * weights * of_target).sum(), lse
