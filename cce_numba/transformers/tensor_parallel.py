"""Output heads that transformers shards over ranks, by rows (`tp_plan="auto"`, a colwise head): each rank has some entries.

Such a head's weight is a DTensor, and its `forward` a wrapper around the layer's own, which gathers the logits. The layer's own
gives `head.Products` here, whose loss the ranks compute together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from cce_numba.torch.dtensors import is_dtensor

_WRAPPER = "TensorParallelLayer.install_forward.<locals>.tp_forward"
_STYLE = "ColwiseParallel"


def why_not(head: torch.nn.Module) -> str | None:
    """Why the loss of a head that transformers shards cannot be computed on its ranks; None if it can, or is whole."""
    style = _closure_of(head).get("self")
    if style is None:
        return None
    if type(style).__name__ != _STYLE:
        return f"an output head that is sharded over ranks in the style of {type(style).__name__} (not {_STYLE})"
    weight = getattr(head, "weight", None)
    if not is_dtensor(weight):
        return "an output head that is sharded over ranks, whose weight is no DTensor (a quantized one?)"
    return None


def own_forward(head: torch.nn.Module) -> Callable[..., Any]:
    """The head's `forward`, without what transformers wraps around it on several ranks."""
    return _closure_of(head).get("original_forward", head.forward)


def is_sharded(head: torch.nn.Module) -> bool:
    """Whether transformers shards it over ranks."""
    return bool(_closure_of(head))


def _closure_of(head: torch.nn.Module) -> dict[str, Any]:
    """What the wrapper has closed over, by name; nothing of a head that is not wrapped."""
    forward: Any = vars(head).get("forward")
    if getattr(forward, "__qualname__", None) != _WRAPPER:
        return {}
    cells = zip(forward.__code__.co_freevars, forward.__closure__ or (), strict=True)
    return {name: cell.cell_contents for name, cell in cells}
