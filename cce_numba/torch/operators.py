"""The two operators that PyTorch sees, `cce_numba::linear_cross_entropy` and `cce_numba::linear_cross_entropy_backward`.

Operators take and give tensors and plain values only, and their results' shapes must follow from their arguments' shapes. So
what a forward leaves to the backward (`plan.Statistics`) becomes tensors of such shapes, and the rest (the checked problem, the
plan) is made again, which costs the host some microseconds and the device nothing.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cce_numba import arguments, interchange
from cce_numba import loss as losses
from cce_numba import plan as planning
from cce_numba.arguments import GRADIENTS, Problem
from cce_numba.destination import Destination
from cce_numba.interchange import Kind
from cce_numba.plan import Gradients, Plan, Statistics
from cce_numba.terms import Terms
from cce_numba.torch import memory

# Options travel in a few lists, since PyTorch takes time for each argument: None as nan, -1 or "", by place.
_TENSORS = ("bias", "logit_scale", "class_weights", "token_weights")
_INTEGERS = ("ignore_index", "shift", "filter_e_grad", "filter_c_grad", "check_targets")
_REALS = ("softcap", "filter_eps", "logit_scale", "label_smoothing", "z_loss")
_WORDS = ("reduction", "backend")
_INPUTS = f"Tensor e, Tensor c, Tensor targets, {', '.join(f'Tensor? {name}' for name in _TENSORS)}"
_OPTIONS = "int[] integers, float[] reals, str words"
_SAVED = ("lse", "target_logit", "n_valid", "tokens", "survivors", "mean_logit")


def apply(
    e: torch.Tensor, c: torch.Tensor, targets: torch.Tensor, bias: torch.Tensor | None, options: Mapping[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(loss, lse)`, recorded by autograd; lse (N,) is flat, 0 where ignored or shifted away. `options`: all others by name."""
    eps, filters_e, filters_c = options["filter_eps"], options["filter_e_grad"], options["filter_c_grad"]
    if eps == "auto":
        eps = torch.finfo(e.dtype).eps * 2.0**-9  # as `arguments` has it; `torch.compile` cannot look there
    if options["softcap"] is not None and options["label_smoothing"]:
        eps = None  # `Options.smooths_capped`
    filters_e = filters_e and e.requires_grad
    filters_c = filters_c and (c.requires_grad or (bias is not None and bias.requires_grad))
    record = torch.is_grad_enabled() and eps is not None and (filters_e or filters_c)
    scale, look = options["logit_scale"], options["check_targets"]
    is_tensor = isinstance(scale, torch.Tensor)
    reals = (options["softcap"], eps, None if is_tensor else scale, options["label_smoothing"], options["z_loss"])
    loss, lse, *_ = forward_op(
        e,
        c,
        targets,
        bias,
        scale if is_tensor else None,
        options["class_weights"],
        options["token_weights"],
        [
            int(options["ignore_index"]),
            int(options["shift"]),
            int(options["filter_e_grad"]),
            int(options["filter_c_grad"]),
            -1 if look is None else int(look),
        ],
        [math.nan if real is None else float(real) for real in reals],
        f"{options['reduction']},{options['backend'] or ''}",
        record,
    )
    return loss, lse


def _given(tensors: tuple[Any, ...], integers: list[int], reals: list[float], words: str) -> dict[str, Any]:
    """The options by name, as the functions of `loss` take them."""
    given: dict[str, Any] = dict(zip(_INTEGERS, integers, strict=True))
    given |= {name: bool(given[name]) for name in ("filter_e_grad", "filter_c_grad")}
    given["check_targets"] = None if given["check_targets"] < 0 else bool(given["check_targets"])
    given |= {name: None if real != real else real for name, real in zip(_REALS, reals, strict=True)}
    given |= {name: word or None for name, word in zip(_WORDS, words.split(","), strict=True)}
    return given | {name: x for name, x in zip(_TENSORS, tensors, strict=True) if x is not None}


@contextlib.contextmanager
def prepared(e: torch.Tensor, c: torch.Tensor, targets: torch.Tensor, given: dict[str, Any]) -> Iterator[tuple[Problem, Plan]]:
    """The checked problem and its plan, as `loss` prepares them; inside, PyTorch's device, stream and memory are current."""
    native_e = interchange.take("e", e)
    kind = Kind("torch", native_e.device.id if interchange.is_on_device(native_e) else None, memory.tensor_of)
    backend = given.get("backend") or ("cpu" if e.device.type == "cpu" else None)  # no need to ask those for GPUs
    with memory.from_pytorch(e.device), kind.current():
        problem = arguments.problem(native_e, c, targets, given, kind=kind)
        yield problem, planning.choose(problem, backend)


@torch.library.custom_op(
    "cce_numba::linear_cross_entropy",
    mutates_args=(),
    schema=f"({_INPUTS}, {_OPTIONS}, bool record) -> ({', '.join(['Tensor'] * (1 + len(_SAVED)))})",
)
def forward_op(e: torch.Tensor, c: torch.Tensor, targets: torch.Tensor, *other: Any) -> tuple[torch.Tensor, ...]:
    """The loss, and what `_saved` makes of the statistics; `record`: whether the backward will want survivors."""
    *tensors, integers, reals, words, record = other
    with prepared(e, c, targets, _given(tuple(tensors), integers, reals, words)) as (problem, plan):
        statistics = losses._statistics(problem, plan, with_grad=record)
        loss = losses._loss(problem, plan, statistics, Terms.of(problem, statistics))
        return loss, *_saved(problem, statistics, record)


def _saved(p: Problem, statistics: Statistics, record: bool) -> list[torch.Tensor]:
    """The tensors `_SAVED`, as the fake of the operator tells their shapes.

    The CPU's tokens and blocks are only those that count: zeros follow. Zeros alone are what it did not record after all,
    since nearly everything survives: a block that counts keeps its targets at least.
    """
    tokens, bits, mean_logit = statistics.tokens, statistics.survivors, statistics.mean_logit
    n_blocks = planning.ceil_div(p.N, statistics.survivor_block)
    if len(tokens) < p.N:
        tokens = np.concatenate([tokens, np.zeros(p.N - len(tokens), tokens.dtype)])
    if not record or p.N == 0:
        bits = p.xp.empty((0, 0), np.uint8)
    elif bits is None:
        bits = np.zeros((n_blocks, planning.ceil_div(p.V, 8)), np.uint8)
    elif len(bits) < n_blocks:
        bits = np.concatenate([bits, np.zeros((n_blocks - len(bits), bits.shape[1]), np.uint8)])
    elif not bits.flags.c_contiguous:  # a device's rows go on after the last entry, and it may read that
        bits = interchange.array_module(bits).ndarray((n_blocks, bits.strides[0]), bits.dtype, bits.data)
    if mean_logit is None:
        mean_logit = p.xp.empty(0, p.compute_dtype)
    return memory.tensors_of((statistics.lse, statistics.target_logit, statistics.n_valid, tokens, bits, mean_logit))


def _statistics(p: Problem, plan: Plan, saved: tuple[torch.Tensor, ...]) -> Statistics:
    """What `_saved` was made of."""
    lse, target_logit, n_valid, tokens, bits, mean_logit = map(interchange.take, _SAVED, saved)
    if not p.on_device:
        tokens = tokens[: int(n_valid)]
    recorded = bits.size > 0 and (p.on_device or bool(bits[0].any()))
    return Statistics(
        tokens=tokens,
        n_valid=n_valid,
        lse=lse,
        target_logit=target_logit,
        survivors=bits[:, : planning.ceil_div(p.V, 8)] if recorded else None,
        survivor_block=plan.tiles.survivor_block,
        mean_logit=mean_logit if p.options.smooths_capped else None,
    )


@torch.library.custom_op(
    "cce_numba::linear_cross_entropy_backward",
    mutates_args=(),
    schema=f"(Tensor? d_loss, Tensor? d_lse, {', '.join(f'Tensor {name}' for name in _SAVED)}, {_INPUTS}, {_OPTIONS}, str wrt) "
    "-> Tensor[]",
)
def backward_op(d_loss: torch.Tensor | None, d_lse: torch.Tensor | None, *other: Any) -> list[torch.Tensor]:
    """The gradients that `wrt` names, separated by commas: of `sum(d_loss * loss) + sum(d_lse * lse)`, lse being flat."""
    saved, (e, c, targets, *tensors, integers, reals, words, wrt) = other[: len(_SAVED)], other[len(_SAVED) :]
    given = _given(tuple(tensors), integers, reals, words) | {"check_targets": False}  # the forward has looked
    grads = _gradients_like({"e": e, "c": c, "bias": tensors[0]}, wrt)
    with prepared(e, c, targets, given) as (problem, plan):
        flat = {name: interchange.take(name, grad).reshape(getattr(problem, name).shape) for name, grad in grads.items()}
        destination = Destination(frozenset(grads), Gradients(**grads), Gradients(**flat), False)  # fresh: nothing to check
        statistics = _statistics(problem, plan, saved)
        if d_lse is not None:
            d_lse = problem.per_token(interchange.take("d_lse", d_lse))
        parts, d_loss_or_0 = Terms.of(problem, statistics), 0.0 if d_loss is None else d_loss
        losses._backward(problem, plan, statistics, parts, d_loss_or_0, d_lse, destination)
    return list(grads.values())


def _gradients_like(inputs: dict[str, torch.Tensor], wrt: str) -> dict[str, torch.Tensor]:
    return {name: torch.empty_like(inputs[name], memory_format=torch.contiguous_format) for name in wrt.split(",")}


@forward_op.register_fake
def _(e: torch.Tensor, c: torch.Tensor, targets: torch.Tensor, *other: Any) -> tuple[torch.Tensor, ...]:
    *tensors, integers, reals, words, record = other
    given = _given(tuple(tensors), integers, reals, words)
    _check_shapes(e, c, targets, tensors[0])
    N, V, shift = targets.numel(), c.shape[0], given["shift"]
    wide = torch.float64 if e.dtype == torch.float64 else torch.float32
    loss_shape: Any = ()
    if given["reduction"] == "none":
        loss_shape = targets[..., shift:].shape if shift else targets.shape
    capped = bool(given["label_smoothing"]) and given["softcap"] is not None
    scale = given["logit_scale"]
    scaled = scale is not None and (isinstance(scale, torch.Tensor) or scale != 1)
    form = _Form.of(e.dtype, e.device, given["backend"], scaled, capped)
    rows = (0, 0)
    if record and N != 0:
        per_unit = 8 * form.row_bytes
        rows = (N + form.survivor_block - 1) // form.survivor_block, (V + per_unit - 1) // per_unit * form.row_bytes
    return (
        e.new_empty(loss_shape, dtype=wide),
        e.new_empty(N, dtype=wide),
        e.new_empty(N, dtype=wide),
        e.new_empty((), dtype=torch.int64),
        e.new_empty(N, dtype=form.tokens),
        e.new_empty(rows, dtype=torch.uint8),
        e.new_empty(N if capped else 0, dtype=wide),
    )


@backward_op.register_fake
def _(d_loss: torch.Tensor | None, d_lse: torch.Tensor | None, *other: Any) -> list[torch.Tensor]:
    e, c, _, bias, *_, wrt = other[len(_SAVED) :]
    return list(_gradients_like({"e": e, "c": c, "bias": bias}, wrt).values())


@dataclass(frozen=True)
class _Form:
    """How a backend leaves statistics: the tokens' dtype, tokens in a block of survivors, and a unit of its rows' bytes."""

    tokens: torch.dtype
    survivor_block: int
    row_bytes: int

    @staticmethod
    @functools.cache
    def of(dtype: torch.dtype, device: torch.device, backend: str | None, scaled: bool, capped: bool) -> _Form:
        """Found by asking it for those of one token and eight entries, of which one survives: it alone knows.

        scaled: whether there is a `logit_scale`; capped: whether label smoothing meets a softcap. Not all take these.
        """
        xp: Any = np if device.type == "cpu" else importlib.import_module("cupy")
        name = str(dtype).removeprefix("torch.")
        numpy_dtype = interchange.BFLOAT16 if name == "bfloat16" else np.dtype(name)
        given: dict[str, Any] = {"filter_eps": 0.5}
        given |= {"logit_scale": 0.5} if scaled else {}
        given |= {"label_smoothing": 0.5, "softcap": 1.0} if capped else {}
        with Kind("cupy", None if device.type == "cpu" else device.index or 0, _as_it_is).current():
            e, c, targets = xp.zeros((1, 8), numpy_dtype), xp.zeros((8, 8), numpy_dtype), xp.zeros(1, np.int64)
            problem = arguments.problem(e, c, targets, given)
            plan = planning.choose(problem, backend)
            statistics = planning.backend_module(plan.backend).forward(problem, plan, record_survivors=True)
        bits, tokens = statistics.survivors, memory.DTYPES[np.dtype(statistics.tokens.dtype)]
        return _Form(tokens, statistics.survivor_block, 1 if bits is None else bits.strides[0])


def _as_it_is(native: Any) -> Any:
    return native


def _check_shapes(e: torch.Tensor, c: torch.Tensor, targets: torch.Tensor, bias: torch.Tensor | None) -> None:
    """What `torch.compile` must know to trace; `arguments.problem` says all of it, and more, when it runs."""
    if e.ndim < 1 or c.ndim != 2 or e.shape[-1] != c.shape[1]:
        raise ValueError(f"c: must have shape (V, D) for e (..., D), got {tuple(c.shape)} for e {tuple(e.shape)}")
    if targets.shape != e.shape[:-1]:
        expected = tuple(e.shape[:-1])
        raise ValueError(
            f"targets: must have the shape of e without its last dimension, {expected}, got {tuple(targets.shape)}"
        )
    if bias is not None and bias.shape != c.shape[:1]:
        raise ValueError(f"bias: must have shape (V,) = ({c.shape[0]},), got {tuple(bias.shape)}")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    *tensors, integers, reals, words, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(*output[1:], *tensors)
    ctx.options = integers, reals, words


def _vector_jacobian_product(ctx: Any, d_loss: Any, d_lse: Any, *unused: Any) -> tuple[Any, ...]:
    places = {"e": 0, "c": 1, "bias": 3}  # among the operator's arguments
    names = [name for name in GRADIENTS if ctx.needs_input_grad[places[name]]]
    grads: list[Any] = [None] * len(ctx.needs_input_grad)
    if names and not (d_loss is None and d_lse is None):
        for name, grad in zip(
            names, backward_op(d_loss, d_lse, *ctx.saved_tensors, *ctx.options, ",".join(names)), strict=True
        ):
            grads[places[name]] = grad
    return tuple(grads)


def _no_second_derivatives(ctx: Any, *unused: Any) -> None:
    raise NotImplementedError(
        "cce_numba.torch.linear_cross_entropy: its gradients have no derivatives (double backward); "
        "impl='torch_compile', which stores the logits, has them"
    )


forward_op.register_autograd(_vector_jacobian_product, setup_context=_setup_context)
backward_op.register_autograd(_no_second_derivatives)
