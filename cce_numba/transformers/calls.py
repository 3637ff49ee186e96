"""One call of a patched model: whether its logits are made, and the call itself if they are not."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers.utils import ModelOutput

from cce_numba.transformers import views
from cce_numba.transformers.logits import Call, Logits, NoLogits
from cce_numba.transformers.patched import Patch

# The argument by which Trainer has a loss of its own computed in place of the model's, see `trainer`.
LOSS_OF_OUTPUT = "_cce_numba_loss_of_output"

# .losses: how many calls have computed a loss without logits; .is_watched: whether a trainer sees to it that some do.
in_this_thread = threading.local()
_warned: set[str] = set()


def run(patch: Patch, forward: Callable[..., Any], model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a patched model returns; `forward` is the function that it was before."""
    labels = args[patch.place_of_labels] if patch.place_of_labels < len(args) else kwargs.get("labels")
    skip_logits, loss_of_output = kwargs.pop("skip_logits", None), kwargs.pop(LOSS_OF_OUTPUT, None)
    if labels is None and model.training and torch.is_grad_enabled():
        _warn_of_logits(model)
    if labels is None or not makes_no_logits(model, patch, skip_logits):
        return forward(model, *args, **kwargs)
    if loss_of_output is not None:
        kwargs = {name: x for name, x in kwargs.items() if name not in loss_of_output.withheld}
    head = head_of(model)
    path, call = views.path_to(model, head), Call(type(model).__name__, head, patch.options)
    if path is None:
        raise NotImplementedError(f"{call.model_name}: its output head is not among its submodules; unpatch it")

    def complete_output(view: Any) -> Any:
        return _completed(call, forward(view, *args, **kwargs), loss_of_output, labels)

    output = views.with_part(model, path, StandInHead(call, _entries_of(head)), complete_output)
    if not torch.compiler.is_dynamo_compiling():
        in_this_thread.losses = losses_in_this_thread() + 1
    return output


def makes_no_logits(model: Any, patch: Patch, skip_logits: bool | None) -> bool:
    """Whether a call with labels makes no logits; `skip_logits`: what the caller wants, or None."""
    return (model.training or not patch.logits_in_evaluation) if skip_logits is None else skip_logits


def losses_in_this_thread() -> int:
    """How many calls have computed a loss without logits."""
    return getattr(in_this_thread, "losses", 0)


def warn_once(text: str) -> None:
    """A warning that comes once in a process."""
    if text not in _warned:
        _warned.add(text)
        warnings.warn(text, stacklevel=2)


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Without the warning of a call that asks for no loss: the caller warns if none has, and has more to say."""
    before = getattr(in_this_thread, "is_watched", False)
    in_this_thread.is_watched = True
    try:
        yield
    finally:
        in_this_thread.is_watched = before


def _warn_of_logits(model: Any) -> None:
    if torch.compiler.is_dynamo_compiling() or getattr(in_this_thread, "is_watched", False):
        return
    warn_once(
        f"{type(model).__name__}: is patched by cce_numba.transformers, but was called in training without labels. So it makes "
        "logits for a loss that something else computes of them (such as a trainer with a compute_loss of its own). Give it "
        "labels, or compute that loss from its hidden states by cce_numba.torch.linear_cross_entropy, or unpatch it if this "
        "is meant"
    )


def head_of(model: Any) -> torch.nn.Module:
    """The output head of a model, with the adapters on it; raises NotImplementedError if it cannot be replaced."""
    head = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Module):
        raise NotImplementedError(f"{type(model).__name__}: cannot be patched, since it has no output head")
    return head


def _entries_of(head: Any) -> int:
    """V. An adapter knows it of what it is on: its own weight may be made when asked for, and PEFT's own count may be D."""
    for module in (getattr(head, "original_module", None), getattr(head, "base_layer", None), head):
        if isinstance(n_entries := getattr(module, "out_features", None), int):
            return n_entries
    return head.weight.shape[0]


class StandInHead:
    """What is in the place of the output head while the model runs: it puts the logits off. Its attributes are the head's."""

    def __init__(self, call: Call, n_entries: int) -> None:
        self.call, self.n_entries = call, n_entries

    def __call__(self, input: torch.Tensor) -> Logits:
        """What stands for the logits of these hidden states."""
        return Logits(input, self.n_entries, self.call)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.call.head, name)


def _completed(call: Call, output: Any, loss_of_output: Any, labels: torch.Tensor) -> Any:
    """The output with its loss, and with something that says why there are no logits in their place."""
    if loss_of_output is not None:
        if not isinstance(output, ModelOutput):
            raise NotImplementedError(f"{call.model_name}: must return a ModelOutput for {loss_of_output.name}, got {output!r}")
        call.who = loss_of_output.name
        output = type(output)(**(dict(output.items()) | {"loss": loss_of_output(output, labels)}))
    if not call.losses:
        raise NotImplementedError(
            f"{call.who}: was given labels, but computes no cross-entropy of what the output head returns; unpatch it"
        )
    if isinstance(output, ModelOutput):
        return type(output)(**{name: _without_logits(call, x) for name, x in output.items()})
    return tuple(_without_logits(call, x) for x in output) if isinstance(output, tuple) else output


def _without_logits(call: Call, x: Any) -> Any:
    return NoLogits(call.model_name) if isinstance(x, Logits) else x
