"""What stands for the logits of a call that does not make them: between head and loss, and in what the call returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch.nn import functional as F
from torch.utils import _pytree

from cce_numba.transformers import head as heads
from cce_numba.transformers.head import NeedsLogits, Products


class NoSuchUse(AttributeError, NotImplementedError):
    """An attribute is asked for: whether an object has it, libraries ask by `hasattr`."""


class Refusing:
    """An object of which any use but those that a class adds is refused, by name."""

    def _refuse(self, what: str) -> NoReturn:
        raise NotImplementedError(what)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)  # how Python asks what an object can do
        try:
            self._refuse(name)
        except NotImplementedError as error:
            raise NoSuchUse(str(error)) from None

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first_refusing((*args, *(kwargs or {}).values()))._refuse(getattr(function, "__name__", str(function)))


def first_refusing(values: Any) -> Any:
    """In lists too, as `torch.cat` has them; None if there is none."""
    for x in values:
        if isinstance(x, tuple | list):
            x = first_refusing(x)
        if isinstance(x, Refusing):
            return x
    return None


def _refused(name: str) -> Callable[..., NoReturn]:
    def method(self: Refusing, *_: Any) -> NoReturn:
        self._refuse(name)

    return method


_OPERATORS = (
    "add",
    "radd",
    "sub",
    "rsub",
    "mul",
    "rmul",
    "truediv",
    "rtruediv",
    "neg",
    "pow",
    "matmul",
    "lt",
    "le",
    "gt",
    "ge",
)
for _operator in (*_OPERATORS, "getitem", "setitem", "len", "iter", "bool", "float", "array"):
    setattr(Refusing, f"__{_operator}__", _refused(f"__{_operator}__"))


@dataclass(eq=False)
class NoLogits(Refusing):
    """What a call that made no logits returns in their place."""

    model_name: str

    def _refuse(self, what: str) -> NoReturn:
        raise NotImplementedError(
            f"{self.model_name}: there are no logits for {what}: cce_numba.transformers.patch has the loss computed without "
            "them. Call the model with skip_logits=False to have both, or without labels, or unpatch it"
        )


# Without leaves, so that it goes through what takes outputs apart and puts them together: FSDP, torch.export.
_pytree.register_pytree_node(NoLogits, lambda x: ([], x.model_name), lambda _, model_name: NoLogits(model_name))


@dataclass
class Call:
    """One call of a patched model."""

    model_name: str
    head: torch.nn.Module
    options: dict[str, Any]  # of `cce_numba.torch.linear_cross_entropy`
    losses: int = 0
    who: str = ""  # whose loss it is, if not the model's

    def __post_init__(self) -> None:
        self.who = self.who or self.model_name

    def refuse(self, what: str) -> NoReturn:
        """That the logits be used in a way that needs them."""
        raise NotImplementedError(
            f"{self.who}: does with its logits what cannot be done without making them: {what}; unpatch it"
        )


@dataclass(eq=False)
class Logits(Refusing):
    """What stands for a head's logits (..., V) of the hidden states (..., D).

    The steps of tokens are done to the hidden states at once. Those of values (scale, softcap, bias, entries of the vocabulary)
    are kept: names of methods of `Products`, with their arguments. The head runs when the loss is asked for.
    """

    hidden: torch.Tensor
    n_entries: int  # V
    call: Call
    steps: tuple[tuple[str, tuple[Any, ...]], ...] = ()

    def _refuse(self, what: str) -> NoReturn:
        self.call.refuse(what)

    def _then(self, name: str, *arguments: Any) -> Logits:
        return dataclasses.replace(self, steps=(*self.steps, (name, arguments)))

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.hidden.shape[:-1], self.n_entries))

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

    def contiguous(self) -> Logits:
        return self

    def float(self) -> Logits:
        return self  # they are float32 at least, where they are made

    def to(self, *args: Any, **kwargs: Any) -> Logits:
        for x in (*args, *kwargs.values()):
            if isinstance(x, torch.Tensor):
                x = x.device
            if isinstance(x, torch.device | str) and torch.device(x) != self.device:
                self._refuse(f"to({x!r})")
        return self

    def view(self, *shape: Any) -> Logits:
        if len(shape) == 1 and isinstance(shape[0], tuple | list):
            shape = tuple(shape[0])
        if not shape or shape[-1] != self.n_entries:
            self._refuse(f"view{shape}, where the output head has {self.n_entries} rows")
        return dataclasses.replace(self, hidden=self.hidden.reshape(*shape[:-1], self.hidden.shape[-1]))

    reshape = view

    def tanh(self) -> Logits:
        if any(name == "tanh" for name, _ in self.steps):
            self._refuse("tanh, twice")
        return self._then("tanh")

    def __mul__(self, other: Any) -> Logits:
        self._check_factor("*", other)
        return self._then("__mul__", other)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Logits:
        self._check_factor("/", other)
        return self._then("__truediv__", other)

    def __add__(self, other: Any) -> Logits:
        """A bias, one number for each entry of the vocabulary."""
        if not heads.is_per_entry(other, self.n_entries):
            self._refuse(f"__add__ of {type(other).__name__} (only a bias, of one number for each entry, is known)")
        return self._then("__add__", other)

    __radd__ = __add__

    def __getitem__(self, index: Any) -> Logits:
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
        n_entries = len(range(*entries.indices(self.n_entries)))
        return dataclasses.replace(logits._then("entries", entries), n_entries=n_entries)

    def _check_factor(self, operator: str, other: Any) -> None:
        is_tensor = isinstance(other, torch.Tensor) and (other.numel() == 1 or heads.is_per_entry(other, self.n_entries))
        if not (is_tensor or heads.is_positive_number(other)):
            self._refuse(f"{operator} {type(other).__name__} (only positive numbers, and tensors of 1 or V, are known)")

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        logits = first_refusing((*args, *kwargs.values()))
        first = args[0] if args else kwargs.get("input")
        if first is logits and function is F.cross_entropy:
            return _cross_entropy(*args, **kwargs)
        if first is logits and function is torch.tanh:
            return logits.tanh()
        name = getattr(function, "__name__", str(function))
        if name in ("add", "__add__", "__radd__", "mul", "__mul__", "__rmul__") and len(args) == 2 and args[1] is logits:
            return args[1] + args[0] if "add" in name else args[1] * args[0]
        return logits._refuse(name)


def _cross_entropy(
    input: Logits,
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
    given: dict[str, Any] = {"class_weights": weight, "ignore_index": ignore_index, "reduction": reduction}
    if label_smoothing:
        given["label_smoothing"] = label_smoothing

    def loss_of(products: Any) -> torch.Tensor:
        for name, arguments in logits.steps:
            products = getattr(products, name)(*arguments)
        if not isinstance(products, Products):
            raise NeedsLogits(f"the steps {', '.join(name for name, _ in logits.steps)} in this order")
        return heads.cross_entropy(products, target, call.options | given)

    call.losses += 1
    try:
        return heads.loss_in(call.head, logits.hidden, loss_of)
    except NeedsLogits as error:
        call.refuse(str(error))
