"""A function that several ranks call together: who they are, and this rank's part of what it was given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from cce_numba.parallel.agreement import before_others_wait
from cce_numba.ranks import Sharing
from cce_numba.torch import dtensors, vocab_parallel

NAMES = ("process_group", "tokens_axis", "vocab_parallel_options")


def are_named(process_group: Any, tokens_axis: Any, vocab_parallel_options: Any, *tensors: Any) -> bool:
    """Whether a call is one of several ranks, and has not been through `call`."""
    if process_group is None:
        return tokens_axis is not None or vocab_parallel_options is not None or any(map(dtensors.is_dtensor, tensors))
    return not isinstance(process_group, Sharing)


@torch.compiler.disable
def call(function: Callable[..., Any], arguments: dict[str, Any], in_place: bool = False) -> Any:
    """What `function` returns on these ranks: it is called with this rank's plain tensors, and a `Sharing` as `process_group`.

    arguments: the function's, by name. in_place: it adds to the `.grad` of tensors. An error that this rank raises before all
    ranks have agreed on the call is told to the others.
    """
    process_group, tokens_axis, options = (arguments.pop(name) for name in NAMES)
    e, c = arguments["e"], arguments["c"]
    if dtensors.is_dtensor(e) or dtensors.is_dtensor(c):
        if process_group is not None or options is not None or tokens_axis is not None:
            raise ValueError("process_group: must be None with DTensors, whose mesh has one")
        others = {name: x for name, x in arguments.items() if name not in ("e", "c", "bias")}
        placed = dtensors.Placed.of(e, c, arguments["bias"], others, in_place)
        with before_others_wait(placed.sharing.agreement):
            found = function(**placed.others, e=placed.e, c=placed.c, bias=placed.bias, process_group=placed.sharing)
        return placed.results(found)
    on_device = isinstance(e, torch.Tensor) and e.device.type != "cpu"
    sharing = vocab_parallel.sharing_of(process_group, options, tokens_axis, on_device)
    with before_others_wait(sharing.agreement):
        vocab_parallel.check_rows(options, c)
        return function(**arguments, process_group=sharing)


def shape_of_tokens(sharing: Any, e: torch.Tensor, targets: torch.Tensor) -> torch.Size:
    """The tokens of all ranks, of which e may have a part."""
    return e.shape[:-1] if sharing is None else targets.shape[: e.ndim - 1]
