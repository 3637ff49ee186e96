"""What an output head computes, and the loss of it.

The head's own `forward` runs, with hidden states that are a `Hidden`. A linear layer of these returns `Products`: a sum of
products that are not made. So adapters need no code of their own here. With LoRA, a head gives `hidden @ W.T + scale * low @
B.T` with `low = hidden @ A.T`: a sum of two products. Its loss is that of `[hidden, scale * low] @ [W, B].T`, side by side.

That costs a copy of the weights, and a gradient as large as it: `2 * V * (D + rank)` numbers, however many tokens there are. N
tokens' stored logits cost at least `4 * N * V`. The sum `W + scale * B @ A` would cost as much, and in 16 bits it would lose
what is small in it; and a dropout before A would not fit in.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.modules import module as modules

from cce_numba.torch import linear_cross_entropy
from cce_numba.torch.dtensors import as_replicate, is_dtensor
from cce_numba.transformers import tensor_parallel, views


class NeedsLogits(NotImplementedError):
    """Something cannot be done without the logits; says what."""


class Hidden:
    """Hidden states inside an output head: a linear layer of them becomes `Products`. Else they do what the tensor does.

    They are no subclass of tensors, since what a compiler or an exporter has for a tensor may be one already.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)  # how Python asks what an object can do
        value = getattr(self.tensor, name)
        return functools.partial(_of_tensors, value) if callable(value) else as_hidden(value)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.linear:
            return _linear(*args, **(kwargs or {}))
        return _of_tensors(function, *args, **(kwargs or {}))


def _operator(name: str) -> Callable[..., Any]:
    def method(self: Hidden, *others: Any) -> Any:
        return _of_tensors(getattr(self.tensor, name), *others)

    return method


_ARITHMETIC = ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "neg", "pow", "matmul", "rmatmul")
for _name in (*_ARITHMETIC, "lt", "le", "gt", "ge", "getitem", "len"):
    setattr(Hidden, f"__{_name}__", _operator(f"__{_name}__"))


def _linear(input: Any, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Products:
    return Products(((tensor_of(input), weight),), bias)


def _of_tensors(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return as_hidden(function(*map(tensor_of, args), **{name: tensor_of(x) for name, x in kwargs.items()}))


def as_hidden(x: Any) -> Any:
    """A tensor as hidden states; what else it is, as it is."""
    return Hidden(x) if isinstance(x, torch.Tensor) else x


def tensor_of(x: Any) -> Any:
    """The tensor that hidden states or products stand for, in tuples and lists too; what else it is, as it is."""
    if isinstance(x, tuple | list):
        return type(x)(map(tensor_of, x))
    if isinstance(x, Products):
        x = x.made()
    return x.tensor if isinstance(x, Hidden) else x


@dataclass(eq=False)
class Products:
    """What stands for the sum of `hidden @ weight.T`, plus bias, times `factor / divisor`; (..., V), each hidden (..., D).

    With `inside`, such a pair too, for `factor / divisor * tanh(inside * (the sum + bias))`. Divisors are kept apart, so that
    `tanh(logits / cap) * cap` gives a scale of exactly 1. Steps that are not known here make the products, and go on with them
    as hidden states: that is right for what lies between the two layers of an adapter.
    """

    terms: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    bias: torch.Tensor | None = None
    factor: float = 1.0
    divisor: float = 1.0
    inside: tuple[float, float] | None = None
    on_ranks: bool = False  # whether weight and bias are DTensors, of which each rank has some rows

    @property
    def n_entries(self) -> int:
        """V."""
        return self.terms[0][1].shape[0]

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.terms[0][0].shape[:-1], self.n_entries))

    @property
    def dtype(self) -> torch.dtype:
        return self.terms[0][0].dtype

    @property
    def device(self) -> torch.device:
        return self.terms[0][0].device

    def to(self, *args: Any, **kwargs: Any) -> Products:
        return self  # they are float32 at least, where they are made

    def float(self) -> Products:
        return self

    def tanh(self) -> Any:
        if self.inside is not None:
            return self.made().tanh()
        return dataclasses.replace(self, factor=1.0, divisor=1.0, inside=(self.factor, self.divisor))

    def entries(self, which: slice) -> Products:
        """Those entries of the vocabulary alone."""
        terms = tuple((hidden, weight[which]) for hidden, weight in self.terms)
        return dataclasses.replace(self, terms=terms, bias=None if self.bias is None else self.bias[which])

    def __add__(self, other: Any) -> Any:
        if self.inside is None and isinstance(other, Products) and other.inside is None:
            other = other.with_each_times((other.factor / other.divisor) / (self.factor / self.divisor))
            return dataclasses.replace(self, terms=self.terms + other.terms, bias=_sum(self.bias, other.bias))
        if self.inside is None and is_per_entry(other, self.n_entries):
            bias = other.reshape(-1) * (self.divisor / self.factor)
            return dataclasses.replace(self, bias=_sum(self.bias, bias))
        return self.made() + other

    __radd__ = __add__

    def __neg__(self) -> Any:
        return self * -1

    def __sub__(self, other: Any) -> Any:
        return self + -other

    def __rsub__(self, other: Any) -> Any:
        return -self + other

    def __mul__(self, other: Any) -> Any:
        if is_positive_number(other):
            return dataclasses.replace(self, factor=self.factor * other)
        if self.inside is None and isinstance(other, int | float):
            return self.with_each_times(other)
        if self.inside is None and isinstance(other, torch.Tensor) and other.numel() == 1:
            return self.with_each_times(other.reshape(()))
        if self.inside is None and is_per_entry(other, self.n_entries):
            rows = other.reshape(-1)
            terms = tuple((hidden, weight * rows[:, None]) for hidden, weight in self.terms)
            return dataclasses.replace(self, terms=terms, bias=None if self.bias is None else self.bias * rows)
        return self.made() * other

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        if is_positive_number(other):
            return dataclasses.replace(self, divisor=self.divisor * other)
        return self * (1 / other)

    def with_each_times(self, ratio: Any) -> Products:
        """Each hidden and the bias times a ratio, a number or a tensor () with a gradient; factor and divisor are 1 no more."""
        if isinstance(ratio, int | float) and ratio == 1:
            return self
        terms = tuple((hidden * ratio, weight) for hidden, weight in self.terms)
        return dataclasses.replace(self, terms=terms, bias=None if self.bias is None else self.bias * ratio)

    def made(self) -> Hidden:
        """The sum itself."""
        total = _sum(*(F.linear(hidden, weight) for hidden, weight in self.terms), self.bias)
        if self.inside is not None:
            total = torch.tanh(total * (self.inside[0] / self.inside[1]))
        return Hidden(total * (self.factor / self.divisor))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)  # how Python asks what an object can do
        return getattr(self.made(), name)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.linear:
            return _linear(*args, **kwargs)
        if function is torch.tanh and len(args) == 1:
            return args[0].tanh()
        operator = function.__name__.removeprefix("__").removesuffix("__")
        if operator in ("add", "sub", "mul") and len(args) == 2 and not kwargs:
            a, b = args
            return getattr(a, f"__{operator}__")(b) if isinstance(a, Products) else getattr(b, f"__r{operator}__")(a)
        return _of_tensors(function, *args, **kwargs)


def is_per_entry(x: Any, n_entries: int) -> bool:
    """Whether x holds one number for each entry of the vocabulary, the same for all tokens."""
    return isinstance(x, torch.Tensor) and x.ndim > 0 and x.shape[-1] == n_entries and x.numel() == n_entries


def is_positive_number(x: Any) -> bool:
    """Whether x is a number that a scale can be."""
    return isinstance(x, int | float) and x > 0


def _sum(*tensors: torch.Tensor | None) -> Any:
    """Of those that are not None; None of none."""
    total: Any = None
    for x in tensors:
        if x is not None:
            total = x if total is None else total + x
    return total


def cross_entropy(products: Products, targets: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    """`torch.nn.functional.cross_entropy` of products (N, V) and targets (N,), without making them.

    `options`: those of `cce_numba.torch.linear_cross_entropy`, but softcap and scale, which the products have.
    """
    on_ranks = _are_on_ranks(products)
    if not on_ranks:
        _check_whole(products)
    scale, softcap = products.factor / products.divisor, None
    if products.inside is not None:
        softcap, (factor, divisor) = scale, products.inside
        scale = factor * products.factor / (divisor * products.divisor)
    (e, c), *others = products.terms
    if others:
        dtype = max(products.terms, key=_width)[0].dtype  # the classifier's, not that of adapters
        e = torch.cat([hidden.to(dtype) for hidden, _ in products.terms], -1)
        c = torch.cat([weight.to(dtype) for _, weight in products.terms], -1)
    options = {**options, "softcap": softcap, "logit_scale": None if scale == 1 else scale}
    if not on_ranks:
        return linear_cross_entropy(e, c, targets.to(e.device), products.bias, **options)
    if not is_dtensor(e):  # the same on all ranks, as its head's own forward takes it
        e = as_replicate(e, c)
    return linear_cross_entropy(e, c, targets.to(e.device), products.bias, **options).to_local()


def _are_on_ranks(products: Products) -> bool:
    """Whether ranks have rows of the classifier. Adapters on such a head are refused."""
    if not products.on_ranks:
        return False
    if len(products.terms) > 1:
        raise NeedsLogits("cross_entropy with adapters on an output head that is sharded over ranks")
    return is_dtensor(products.terms[0][1])


def _width(term: tuple[torch.Tensor, torch.Tensor]) -> int:
    return term[0].shape[-1]


def _check_whole(products: Products) -> None:
    """Tensor parallelism gives a module a part of its weights; and some ways of sharding free them when they are not in use."""
    for _, weight in products.terms:
        is_freed = not torch.compiler.is_compiling() and weight.untyped_storage().nbytes() == 0
        if is_freed or weight.ndim != 2 or hasattr(weight, "full_tensor"):  # a DTensor
            raise NeedsLogits("cross_entropy with an output head in shards, of which this process has a part")


def loss_in(head: torch.nn.Module, hidden: torch.Tensor, loss_of: Callable[[Products], torch.Tensor]) -> torch.Tensor:
    """Runs a head, with its hooks, and returns `loss_of` what its `forward` returns for the hidden states (N, D).

    So the head's parameters are used while its own hooks have them in place: FSDP and ZeRO gather them, offloading fetches
    them. The loss passes these hooks as the head's output, in a dict, for what they do in the backward.
    """
    outer, path, inner = _innermost(head)
    _check_hooks(outer)
    its_own, on_ranks = tensor_parallel.own_forward(inner), tensor_parallel.is_sharded(inner)

    def forward(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        products = its_own(Hidden(hidden), *args, **kwargs)
        if not isinstance(products, Products):
            raise NeedsLogits(
                f"its output head, a {type(inner).__name__}, is no linear layer with adapters and scales alone (quantized?)"
            )
        return {"cross_entropy": loss_of(dataclasses.replace(products, on_ranks=True) if on_ranks else products)}

    return views.with_forward(outer, path, forward, lambda view: view(hidden))["cross_entropy"]


def _innermost(head: Any) -> tuple[Any, tuple[str, ...], Any]:
    """A head, the path in it to the module that computes, and this module; wrappers in between have their own `forward`."""
    while hasattr(head, "_orig_mod"):  # compiled by itself, which here is of no use
        head = head._orig_mod
    inner: Any = head
    path: tuple[str, ...] = ()
    while "_fsdp_wrapped_module" in inner._modules:
        inner, path = inner._fsdp_wrapped_module, (*path, "_fsdp_wrapped_module")
    return head, path, inner


def _check_hooks(head: torch.nn.Module) -> None:
    """A full backward hook waits for the gradients of a module's outputs, and would never run."""
    of_all = modules._global_backward_hooks or modules._global_backward_pre_hooks
    if of_all or any(part._backward_hooks or part._backward_pre_hooks for part in head.modules()):
        raise NeedsLogits("a full backward hook on its output head waits for the gradient of logits; remove the hook")
