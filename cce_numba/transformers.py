"""Hugging Face transformers: causal language models whose training loss is computed without the logits.

A patched model runs its own `forward`. For that time its output head returns `_Logits`, which stand for the logits but are not
made: they take the steps that models put between head and loss (scale, softcap, casts, views, slices), and when these end in
`torch.nn.functional.cross_entropy`, that is `cce_numba.torch.linear_cross_entropy` of the hidden states and the head. Any other
use of them is refused. So it is the model's own code that says what its loss is, and there is no list of models.

It depends on how the models of transformers behave, not on what they are: `get_output_embeddings`, `training`, `labels` among
the arguments of `forward`, and a `ModelOutput` or tuple out of it.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import torch
from torch.nn import functional as F
from transformers.utils import ModelOutput

from cce_numba.torch import LinearCrossEntropy, linear_cross_entropy

__all__ = ["patch", "unpatch"]

# The others of `linear_cross_entropy` are the model's to choose.
OPTIONS = (
    "filter_eps",
    "accum_e_fp32",
    "accum_c_fp32",
    "filter_e_grad",
    "filter_c_grad",
    "impl",
    "label_smoothing",
    "z_loss",
    "check_targets",
    "backend",
)

Model = TypeVar("Model")


def patch(model_or_type: Model, **options: Any) -> Model:
    """Lets a causal language model, or every instance of its class, compute its training loss without the logits.

    Logits are not made when the model is in training mode and `labels` are given, with or without `torch.no_grad`: `logits` of
    what it returns is then None, or missing from a tuple. In evaluation mode, and without labels, nothing changes. The loss is
    that of the model's own `forward`, with its softcap and scale, `num_items_in_batch`, `shift_labels`, `logits_to_keep` and
    auxiliary losses; but its logits are of float32, not rounded to 16 bits. Parameters and the state dict stay as they are.
    Gradient checkpointing, autocast and `torch.compile(fullgraph=True)` work.

    The patch of an instance goes with its copies and pickles; that of a class stays in this process, and is the one for
    `nn.DataParallel`. Patching again replaces the options; an instance's go before its class's.

    Args:
        model_or_type: a model with an `nn.Linear` for its output head (`get_output_embeddings()`), or its class.
        options: those of `cce_numba.torch.linear_cross_entropy` in `OPTIONS`. `filter_eps=None` gives exact gradients;
            `label_smoothing` and `z_loss` change the loss in training.

    Returns `model_or_type`.

    Raises:
        TypeError: it is no model or class with a loss, or there is no such option.
        ValueError: an option's value does not fit.
        NotImplementedError: the output head is no plain `nn.Linear`, or is in shards; later, in training: the model does
            something with its logits that needs them, or computes no cross-entropy of them. It is named, with what it did.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    >>> model = patch(LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes)), filter_eps=None).train()
    >>> tokens = torch.tensor([[1, 2, 3, 4]])
    >>> output = model(tokens, labels=tokens)
    >>> output.loss.backward()
    >>> output.logits is None, unpatch(model)(tokens, labels=tokens).logits.shape
    (True, torch.Size([1, 4, 50]))
    """
    forward = _forward_of(model_or_type)
    if unknown := [name for name in options if name not in OPTIONS]:
        raise TypeError(f"{unknown[0]}: is no option of patch, which takes {', '.join(OPTIONS)}; the model says the rest")
    LinearCrossEntropy(**options)  # checks the values
    place = _place_of_labels(forward, _name(model_or_type))
    if not isinstance(model_or_type, type):
        _head_of(model_or_type)
    unpatch(model_or_type)
    if isinstance(model_or_type, type):
        model_or_type.forward = _class_forward(model_or_type, place, options)  # type: ignore[attr-defined]
    else:
        model_or_type.forward = _InstanceForward(model_or_type, place, options)  # type: ignore[attr-defined]
    return model_or_type


def unpatch(model_or_type: Model) -> Model:
    """Takes back what `patch` did to this very model or class; does nothing where it did nothing. Returns `model_or_type`.

    Raises TypeError if it is no model or class of one, and ValueError if its `forward` was replaced after the patch: that must
    be taken back first.
    """
    forward = _forward_of(model_or_type)
    own: Any = vars(model_or_type).get("forward")
    if isinstance(own, _InstanceForward) or hasattr(own, "_cce_numba_own"):
        before = own.inner if isinstance(own, _InstanceForward) else own._cce_numba_own
        if before is None:
            del model_or_type.forward  # type: ignore[attr-defined]
        else:
            model_or_type.forward = before  # type: ignore[attr-defined]
    elif own is not None and _is_around_a_patch(own):
        raise ValueError(f"{_name(model_or_type)}: {forward!r} has taken the place of the patched forward; take it back first")
    return model_or_type


def _name(model_or_type: Any) -> str:
    return (model_or_type if isinstance(model_or_type, type) else type(model_or_type)).__name__


def _forward_of(model_or_type: Any) -> Callable[..., Any]:
    a_class = model_or_type if isinstance(model_or_type, type) else type(model_or_type)
    if not issubclass(a_class, torch.nn.Module) or not hasattr(model_or_type, "get_output_embeddings"):
        raise TypeError(f"model_or_type: must be a language model of transformers, or its class, got {model_or_type!r}")
    return model_or_type.forward


def _place_of_labels(forward: Callable[..., Any], name: str) -> int:
    """Where `labels` stand among the arguments of a bound `forward`."""
    names = [each for each in inspect.signature(forward).parameters if each != "self"]
    if "labels" not in names:
        raise TypeError(f"model_or_type: must be a model with a loss, but the forward of {name} takes no labels")
    return names.index("labels")


def _is_around_a_patch(forward: Any) -> bool:
    while forward is not None:
        if isinstance(forward, _InstanceForward) or hasattr(forward, "_cce_numba_own"):
            return True
        forward = getattr(forward, "__wrapped__", None)
    return False


def _class_forward(a_class: Any, place: int, options: dict[str, Any]) -> Callable[..., Any]:
    original = _unpatched(a_class.forward)

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _run(self, functools.partial(original, self), place, options, args, kwargs)

    forward._cce_numba_own = vars(a_class).get("forward")  # type: ignore[attr-defined] # None where it is inherited
    return forward


def _unpatched(function: Any) -> Callable[..., Any]:
    """The forward of a class, without the patch of that class or one that it inherits from."""
    return function.__wrapped__ if hasattr(function, "_cce_numba_own") else function


class _InstanceForward:
    """The patched forward of one model: an object, so that copies and pickles of the model have their own."""

    def __init__(self, model: Any, place: int, options: dict[str, Any]) -> None:
        self.model, self.place, self.options = model, place, options
        self.inner = vars(model).get("forward")  # of someone else's patch

    @property
    def __signature__(self) -> inspect.Signature:  # transformers looks which arguments there are
        return inspect.signature(self.inner or functools.partial(type(self.model).forward, self.model))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = self.inner
        if forward is None:
            forward = functools.partial(_unpatched(type(self.model).forward), self.model)
        return _run(self.model, forward, self.place, self.options, args, kwargs)


def _head_of(model: Any) -> torch.nn.Linear:
    head = model.get_output_embeddings()
    reason = None
    if not isinstance(head, torch.nn.Module):
        reason = "it has no output head"
    elif type(head).forward is not torch.nn.Linear.forward:
        reason = f"its output head is a {type(head).__name__}, not a plain torch.nn.Linear (an adapter, or quantized?)"
    elif "forward" in vars(head):
        reason = "the forward of its output head was replaced (by offloading, or another patch?)"
    if reason:
        raise NotImplementedError(f"{type(model).__name__}: cannot be patched, since {reason}")
    return head


@dataclass
class _Call:
    """One forward of a patched model."""

    model_name: str
    options: dict[str, Any]
    losses: int = 0


def _run(model: Any, forward: Callable[..., Any], place: int, options: dict[str, Any], args: Any, kwargs: Any) -> Any:
    labels = args[place] if place < len(args) else kwargs.get("labels")
    if not model.training or labels is None:
        return forward(*args, **kwargs)
    head, call = _head_of(model), _Call(type(model).__name__, options)

    def without_logits(hidden: torch.Tensor) -> _Logits:
        return _Logits(hidden, head.weight, head.bias, call)

    vars(head)["forward"] = without_logits  # `torch.compile` does not follow setattr and delattr here
    try:
        output = forward(*args, **kwargs)
    finally:
        del vars(head)["forward"]
    if not call.losses:
        raise NotImplementedError(
            f"{call.model_name}: was given labels, but computes no cross-entropy of what its output head returns; unpatch it"
        )
    if isinstance(output, ModelOutput):
        return type(output)(**{name: x for name, x in output.items() if not isinstance(x, _Logits)})
    return tuple(x for x in output if not isinstance(x, _Logits)) if isinstance(output, tuple) else output


@dataclass(eq=False)
class _Logits:
    """What stands for `hidden @ weight.T + bias`, times `factor / divisor`; (..., V), as hidden is (..., D).

    With `inside`, such a pair too, for `factor / divisor * tanh(inside * (hidden @ weight.T + bias))`. Divisors are kept apart,
    so that `tanh(logits / cap) * cap` gives a scale of exactly 1.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    call: _Call
    factor: float = 1.0
    divisor: float = 1.0
    inside: tuple[float, float] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        self._check_whole()
        return (*self.hidden.shape[:-1], self.weight.shape[0])

    @property
    def ndim(self) -> int:
        return self.hidden.ndim

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def dtype(self) -> torch.dtype:
        return self.hidden.dtype

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.ndim

    def contiguous(self) -> _Logits:
        return self

    def float(self) -> _Logits:
        return self  # they are float32 at least, where they are made

    def to(self, *args: Any, **kwargs: Any) -> _Logits:
        for x in (*args, *kwargs.values()):
            if isinstance(x, torch.Tensor):
                x = x.device
            if isinstance(x, torch.device | str) and torch.device(x) != self.device:
                self._refuse(f"to({x!r})")
        return self

    def view(self, *shape: Any) -> _Logits:
        if len(shape) == 1 and isinstance(shape[0], tuple | list):
            shape = tuple(shape[0])
        if not shape or shape[-1] != self.shape[-1]:
            self._refuse(f"view{shape}, where the output head has {self.shape[-1]} rows")
        return dataclasses.replace(self, hidden=self.hidden.reshape(*shape[:-1], self.hidden.shape[-1]))

    reshape = view

    def tanh(self) -> _Logits:
        if self.inside is not None:
            self._refuse("tanh, twice")
        return dataclasses.replace(self, factor=1.0, divisor=1.0, inside=(self.factor, self.divisor))

    def __mul__(self, other: Any) -> _Logits:
        self._check_number("*", other)
        return dataclasses.replace(self, factor=self.factor * other)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> _Logits:
        self._check_number("/", other)
        return dataclasses.replace(self, divisor=self.divisor * other)

    def __getitem__(self, index: Any) -> _Logits:
        """Of tokens, `[mask]` and slices as in `[:, :-1]`, and of the vocabulary (which may be padded), `[..., :size]`."""
        if isinstance(index, torch.Tensor) and index.dtype == torch.bool and index.ndim < self.ndim:
            return dataclasses.replace(self, hidden=self.hidden[index])
        parts = list(index) if isinstance(index, tuple) else [index]
        if not all(part is ... or isinstance(part, slice) for part in parts):
            self._refuse("indexing with other than slices, or one mask of tokens")
        if ... not in parts:
            parts.append(...)
        place = parts.index(...)
        parts[place : place + 1] = [slice(None)] * (self.ndim + 1 - len(parts))
        if len(parts) != self.ndim:
            self._refuse(f"indexing {self.ndim} dimensions with {len(parts)}")
        *tokens, entries = parts
        logits = dataclasses.replace(self, hidden=self.hidden[tuple(tokens)])
        if entries == slice(None):
            return logits
        bias = None if self.bias is None else self.bias[entries]
        return dataclasses.replace(logits, weight=self.weight[entries], bias=bias)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)  # how Python asks what an object can do
        self._refuse(name)

    def _check_number(self, operator: str, other: Any) -> None:
        if not isinstance(other, int | float) or not other > 0:
            self._refuse(f"{operator} {type(other).__name__} (only positive numbers are known)")

    def _check_whole(self) -> None:
        """FSDP and ZeRO may gather a module's weights for its own forward alone; they are needed after it."""
        weight = self.weight
        is_freed = weight.ndim != 2 or (not torch.compiler.is_compiling() and weight.untyped_storage().nbytes() == 0)
        if is_freed or hasattr(weight, "full_tensor"):  # a DTensor
            self._refuse("cross_entropy with an output head in shards (of tensor parallelism, FSDP or ZeRO)")

    def _refuse(self, what: str) -> NoReturn:
        raise NotImplementedError(
            f"{self.call.model_name}: does with its logits what cannot be done without making them: {what}; unpatch it"
        )

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, logits = kwargs or {}, _first_logits((*args, *(kwargs or {}).values()))
        first = args[0] if args else kwargs.get("input")
        if first is logits and function is F.cross_entropy:
            return _cross_entropy(*args, **kwargs)
        if first is logits and function is torch.tanh:
            return logits.tanh()
        return logits._refuse(getattr(function, "__name__", str(function)))


def _first_logits(values: Any) -> Any:
    """In lists too, as `torch.cat` has them."""
    for x in values:
        if isinstance(x, tuple | list):
            x = _first_logits(x)
        if isinstance(x, _Logits):
            return x
    return None


def _refused(name: str) -> Callable[..., NoReturn]:
    def method(self: _Logits, *_: Any) -> NoReturn:
        self._refuse(name)

    return method


_OPERATORS = ("add", "radd", "sub", "rsub", "neg", "pow", "rtruediv", "matmul", "lt", "le", "gt", "ge")
for _operator in (*_OPERATORS, "setitem", "len", "iter", "bool", "float", "array"):
    setattr(_Logits, f"__{_operator}__", _refused(f"__{_operator}__"))


def _cross_entropy(
    input: _Logits,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """What `torch.nn.functional.cross_entropy` is with logits that are not made."""
    logits, call = input, input.call
    if logits.ndim != 2 or size_average is not None or reduce is not None:
        logits._refuse(f"cross_entropy of {logits.ndim} dimensions, or with size_average or reduce")
    logits._check_whole()
    scale, softcap = logits.factor / logits.divisor, None
    if logits.inside is not None:
        softcap, (factor, divisor) = scale, logits.inside
        scale = factor * logits.factor / (divisor * logits.divisor)
    given: dict[str, Any] = {"class_weights": weight, "logit_scale": None if scale == 1 else scale}
    if label_smoothing:
        given["label_smoothing"] = label_smoothing
    call.losses += 1
    return linear_cross_entropy(
        logits.hidden,
        logits.weight,
        target,
        logits.bias,
        ignore_index=ignore_index,
        softcap=softcap,
        reduction=reduction,
        **(call.options | given),
    )
