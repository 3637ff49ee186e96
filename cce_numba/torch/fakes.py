"""What the operators' results look like, out of what their arguments look like: for `torch.compile`, which computes nothing."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cce_numba import arguments, interchange
from cce_numba import plan as planning
from cce_numba.backend import backend_module
from cce_numba.interchange import Kind
from cce_numba.torch import memory


def forward(
    e: torch.Tensor, c: torch.Tensor, targets: torch.Tensor, bias: torch.Tensor | None, options: Mapping[str, Any], record: bool
) -> tuple[torch.Tensor, ...]:
    """Empty tensors like the loss and `call.SAVED`. `options`: all of them by name, tensors among them or not."""
    check_shapes(e, c, targets, bias)
    N, V, shift = targets.numel(), c.shape[0], options["shift"]
    wide = torch.float64 if e.dtype == torch.float64 else torch.float32
    loss_shape: Any = ()
    if options["reduction"] == "none":
        loss_shape = targets[..., shift:].shape if shift else targets.shape
    capped = bool(options["label_smoothing"]) and options["softcap"] is not None
    scale = options["logit_scale"]
    scaled = scale is not None and (isinstance(scale, torch.Tensor) or scale != 1)
    is_auto = isinstance(options["filter_eps"], str)
    form = _Form.of(e.dtype, e.device, options.get("backend"), scaled, capped, is_auto, options["filter_c_grad"])
    rows = (0, 0)
    if record and N != 0:
        n_blocks, per_unit = (N + form.survivor_block - 1) // form.survivor_block, 8 * form.row_bytes
        rows = form.block_rows * n_blocks, (V + per_unit - 1) // per_unit * form.row_bytes
    return (
        e.new_empty(loss_shape, dtype=wide),
        e.new_empty(N, dtype=wide),
        e.new_empty(N, dtype=wide),
        e.new_empty((), dtype=torch.int64),
        e.new_empty(N, dtype=form.tokens),
        e.new_empty(rows, dtype=torch.uint8),
        e.new_empty(N if capped else 0, dtype=wide),
    )


@dataclass(frozen=True)
class _Form:
    """How a backend leaves statistics: the tokens' dtype, tokens and rows of a block of survivors, a unit of a row's bytes."""

    tokens: torch.dtype
    survivor_block: int
    block_rows: int
    row_bytes: int

    @staticmethod
    @functools.cache
    def of(
        dtype: torch.dtype,
        device: torch.device,
        backend: str | None,
        scaled: bool,
        capped: bool,
        filter_is_auto: bool,
        filter_c_grad: bool,
    ) -> _Form:
        """Found by asking it for those of one token and eight entries: it alone knows.

        scaled: whether there is a `logit_scale`; capped: whether label smoothing meets a softcap.
        """
        xp: Any = np if device.type == "cpu" else importlib.import_module("cupy")
        name = str(dtype).removeprefix("torch.")
        numpy_dtype = interchange.BFLOAT16 if name == "bfloat16" else np.dtype(name)
        given: dict[str, Any] = {"filter_eps": "auto" if filter_is_auto else 0.5, "filter_c_grad": filter_c_grad}
        given |= {"logit_scale": 0.5} if scaled else {}
        given |= {"label_smoothing": 0.5, "softcap": 1.0} if capped else {}
        with Kind("cupy", None if device.type == "cpu" else device.index or 0, _as_it_is).current():
            e, c, targets = xp.zeros((1, 8), numpy_dtype), xp.zeros((8, 8), numpy_dtype), xp.zeros(1, np.int64)
            problem = arguments.problem(e, c, targets, given)
            plan = planning.choose(problem, backend)
            statistics = backend_module(plan.backend).forward(problem, plan, record_survivors=True)
        bits, tokens = statistics.survivors, memory.DTYPES[np.dtype(statistics.tokens.dtype)]
        block_rows, row_bytes = (1, 1) if bits is None else (len(bits), bits.strides[0])
        return _Form(tokens, statistics.survivor_block, block_rows, row_bytes)


def _as_it_is(native: Any) -> Any:
    return native


def check_shapes(e: torch.Tensor, c: torch.Tensor, targets: torch.Tensor, bias: torch.Tensor | None) -> None:
    """What `torch.compile` must know to trace, and the baseline to run; elsewhere `arguments.problem` says it, and more."""
    if e.ndim < 1 or c.ndim != 2 or e.shape[-1] != c.shape[1]:
        raise ValueError(f"c: must have shape (V, D) for e (..., D), got {tuple(c.shape)} for e {tuple(e.shape)}")
    if targets.shape != e.shape[:-1]:
        expected = tuple(e.shape[:-1])
        raise ValueError(
            f"targets: must have the shape of e without its last dimension, {expected}, got {tuple(targets.shape)}"
        )
    if bias is not None and bias.shape != c.shape[:1]:
        raise ValueError(f"bias: must have shape (V,) = ({c.shape[0]},), got {tuple(bias.shape)}")
