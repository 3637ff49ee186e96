"""What operators' results look like, out of what their arguments look like: for compilers, under which nothing is computed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch

from cce_numba import plan as planning
from cce_numba.arguments import Outline
from cce_numba.backend import StatisticsForm, backend_module
from cce_numba.interchange import Kind
from cce_numba.options import DEFAULTS, Options, compute_dtype_of
from cce_numba.torch import call, checks, memory


def forward(
    e: torch.Tensor,
    c: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    given: Mapping[str, Any],
    wrt: Collection[str],
) -> tuple[torch.Tensor, ...]:
    """Empty tensors like the loss, `call.SAVED` and `call.MORE`.

    `given`: the options that are not tensors, by name; the operator checks them when it runs. `wrt`: the gradients to come.
    """
    several = targets.ndim == e.ndim
    checks.check_shapes(e, c, targets, bias, several)
    dtype = memory.NUMPY_DTYPES[e.dtype]
    options = Options.unchecked(dtype, {**DEFAULTS, **given})
    ids_shape: Any = targets.shape[-1:] if several else ()
    of_tokens = targets[..., 0] if several else targets
    N, V, shift = of_tokens.numel(), c.shape[0], options.shift
    wide = memory.TORCH_DTYPES[compute_dtype_of(dtype)]
    loss_shape: Any = ()
    if options.reduction == "none":
        loss_shape = of_tokens[..., shift:].shape if shift else of_tokens.shape
    outline = Outline(N, V, e.shape[-1], dtype, e.is_cuda, str(e.device), options, 1 if several else None)
    form = _form(outline, e.device, given.get("backend"))
    recorded = options.records_survivors(wrt)
    rows, row_bytes = form.survivors_shape(N, V) if recorded else (0, 0)
    kept_bytes = form.kept_bytes(N, V, options.workspace_bytes) if options.keeps_logits(wrt) else 0
    return (
        e.new_empty(loss_shape, dtype=wide),
        *(e.new_empty(N, dtype=wide) for _ in range(3)),
        e.new_empty((N, *ids_shape), dtype=wide),
        e.new_empty((), dtype=torch.int64),
        e.new_empty(N, dtype=memory.TORCH_DTYPES[form.tokens]),
        e.new_empty(rows * row_bytes, dtype=torch.uint8),
        e.new_empty(kept_bytes, dtype=torch.uint8),
        e.new_empty(N if options.smooths_capped else 0, dtype=wide),
        e.new_empty(() if recorded and options.is_unbiased else 0, dtype=torch.int64),
        e.new_empty(N if options.entropy else 0, dtype=wide),
        e.new_empty((N, *ids_shape) if options.reduction == call.LOGPROBS else 0, dtype=wide),
        e.new_empty(N if options.sum_squares else 0, dtype=wide),
        e.new_empty((N, options.top_k) if options.top_k else 0, dtype=wide),
        e.new_empty((N, options.top_k) if options.top_k else 0, dtype=torch.int64 if options.top_k else wide),
    )


def _form(outline: Outline, device: torch.device, backend: str | None) -> StatisticsForm:
    """The form of the backend that would run; sizes may be symbols, which a compiler has for those that it leaves open."""
    # What is decided by comparing a symbol, the compiled program checks each time. Which backend runs shall not be of that
    # kind.
    N, V, D = (size if isinstance(size, int) else 1 for size in (outline.N, outline.V, outline.D))
    with Kind("cupy", device.index or 0 if outline.on_device else None, _as_it_is).current():
        name, _ = planning.choose_backend(replace(outline, N=N, V=V, D=D), backend)
        return backend_module(name).statistics_form(outline)


def _as_it_is(native: Any) -> Any:
    return native
