"""What `patch` leaves on a model or a class, and how it is found again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch

PATCH = "_cce_numba_patch"  # an attribute of a patched instance: its `Patch`
BASE = "_cce_numba_base"  # an attribute of the class that a patched instance has: the class that it had


@dataclass(frozen=True)
class Patch:
    """What `patch` was told of a model or class."""

    options: dict[str, Any]  # of `cce_numba.torch.linear_cross_entropy`
    logits_in_evaluation: bool
    place_of_labels: int  # among the arguments of the model's `forward`
    before: Any = None  # the `forward` that the model or class had of its own


# Of the `forward` of each patched class, which it has by no attribute: a wrapper copies attributes.
_of_forward: WeakKeyDictionary[Any, tuple[Patch, Callable[..., Any]]] = WeakKeyDictionary()


def mark(forward: Any, patch: Patch, original: Callable[..., Any]) -> None:
    """Says of a function that it is the forward of a patched class, and `original` the one without the patch."""
    _of_forward[forward] = patch, original


def of_forward(forward: Any) -> Patch | None:
    """The patch of a class, if this is the forward that it has by it."""
    return _of_forward[forward][0] if forward in _of_forward else None


def without_patch(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a class, without the patch of that class or of one that it inherits from."""
    return _of_forward[forward][1] if forward in _of_forward else forward


def name_of(model_or_type: Any) -> str:
    """The name of a model's class, or of a class."""
    return (model_or_type if isinstance(model_or_type, type) else type(model_or_type)).__name__


def model_in(model_or_type: Any) -> Any:
    """A language model of transformers, out of its wrappers, or such a class; raises TypeError if there is none."""
    model = model_or_type
    if isinstance(model, type) and issubclass(model, torch.nn.Module) and hasattr(model, "get_output_embeddings"):
        return vars(model).get(BASE, model)
    while isinstance(model, torch.nn.Module):
        if hasattr(type(model), "get_output_embeddings"):  # of its own: wrappers lend what they wrap
            return model
        if hasattr(type(model), "get_base_model"):  # PEFT
            model = model.get_base_model()
        else:
            model = getattr(model, "_orig_mod", None) or getattr(model, "module", None)  # compiled, in parallel
    raise TypeError(f"model_or_type: must be a language model of transformers, or its class, got {_shown(model_or_type)}")


def _shown(x: Any) -> str:
    return f"a {type(x).__name__}" if isinstance(x, torch.nn.Module) else repr(x)


def patch_of(model_or_type: Any) -> Patch | None:
    """What `patch` was told of a model, in its wrappers, or of its class; None if it is not patched."""
    try:
        model = model_in(model_or_type)
    except TypeError:
        return None
    own = None if isinstance(model, type) else vars(model).get(PATCH)
    a_class = model if isinstance(model, type) else type(model)
    return own or of_forward(vars(a_class).get(BASE, a_class).forward)
