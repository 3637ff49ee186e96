"""What the functions for tensors check before `arguments.py` sees arrays: errors in PyTorch's words, dtypes that are cast."""

from __future__ import annotations

import numbers
from typing import Any

import numpy as np
import torch

from cce_numba import arguments, interchange
from cce_numba.arguments import GRADIENTS
from cce_numba.options import Options, flag, integer
from cce_numba.torch import memory

_DTYPES = [memory.TORCH_DTYPES[dtype] for dtype in arguments.DTYPES]
_INSTEAD = {  # of a tensor that requires grad, what gives it one
    "logit_scale": ", or e * logit_scale[..., None] in place of e, which has one (and leaves a bias as it is)",
    "token_weights": ", or multiply the loss of reduction='none' by them, which has one",
}


def check_tensor(name: str, tensor: Any) -> None:
    """Raises TypeError, naming the argument, unless it is a tensor whose memory holds its elements, on one device."""
    if not isinstance(tensor, torch.Tensor):
        kind = type(tensor)
        got = f"{kind.__module__}.{kind.__qualname__}"
        raise TypeError(f"{name}: must be a torch.Tensor, got {got}{_way_to_tensor(name, tensor)}")
    if hasattr(tensor, "full_tensor"):
        raise TypeError(
            f"{name}: must be a plain tensor, got a DTensor; pass {name}.full_tensor(), or, if it is a parameter that FSDP "
            "shards, call the loss in the forward of the module that has it"
        )
    if tensor.is_nested or tensor.layout is not torch.strided:
        layout = "a nested one" if tensor.is_nested else f"layout {tensor.layout}"
        raise TypeError(f"{name}: must be a strided tensor, got {layout}")
    if not torch.compiler.is_compiling() and tensor.is_neg():
        raise TypeError(f"{name}: is a view that negates another's elements when they are read; pass {name}.resolve_neg()")


def _way_to_tensor(name: str, thing: Any) -> str:
    """What a message says of something that is no tensor: how one is made of it."""
    if isinstance(thing, torch.nn.Module):
        return interchange.way_to_tensor_of_module(name, thing)
    if thing is None:
        return ""
    if isinstance(thing, np.ndarray):
        return f"; pass torch.from_numpy({name}) (cce_numba.linear_cross_entropy takes other arrays)"
    if hasattr(thing, "__dlpack__"):
        return f"; pass torch.from_dlpack({name}) (cce_numba.linear_cross_entropy takes other arrays)"
    return f"; pass torch.as_tensor({name})"


def check_integers(name: str, tensor: torch.Tensor) -> None:
    """Raises TypeError, naming the argument, unless it is of an integer dtype (which bool is not)."""
    if tensor.dtype == torch.bool or tensor.is_floating_point() or tensor.is_complex():
        got = str(tensor.dtype).removeprefix("torch.")
        raise TypeError(f"{name}: must be integers, the ids of entries, got dtype {got}")


def check_tensors(e: Any, c: Any, targets: Any, optional: dict[str, Any], name_of_ids: str = "targets") -> None:
    """That they are tensors on e's device; `optional` ones may be None, and a logit scale a number."""
    given = {"e": e, "c": c, name_of_ids: targets}
    for name, tensor in optional.items():
        if name == "logit_scale" and tensor is not None and not isinstance(tensor, torch.Tensor):
            if not isinstance(tensor, numbers.Real):
                raise TypeError(f"logit_scale: must be a number or a torch.Tensor, got {tensor!r}")
        elif tensor is not None:
            given[name] = tensor
    for name, tensor in given.items():
        check_tensor(name, tensor)
        if name in GRADIENTS:
            if tensor.dtype not in _DTYPES:
                way = _way_to_floats(name, tensor, targets)
                raise TypeError(f"{name}: dtype must be one of {', '.join(map(str, _DTYPES))}, got {tensor.dtype}{way}")
        elif tensor.requires_grad and torch.is_grad_enabled():
            instead = _INSTEAD.get(name, "")
            raise ValueError(f"{name}: requires grad, but gets no gradient here; pass {name}.detach(){instead}")
    device = e.device
    if any(tensor.device != device for tensor in given.values()):
        arguments.check_devices({name: tensor.device for name, tensor in given.items()})
    if device.type not in ("cpu", "cuda", "meta"):
        raise ValueError(f"e: must be on the CPU or on CUDA (or meta, for shapes alone), got a tensor on {device}")


def _way_to_floats(name: str, tensor: torch.Tensor, targets: Any) -> str:
    """What a message says of a tensor of another dtype: how one of ours is made of it."""
    if isinstance(targets, torch.Tensor) and targets.is_floating_point():
        return f"; {name} and targets look exchanged: targets come third"
    if tensor.is_quantized:
        return f"; pass {name}.dequantize()"
    if tensor.element_size() == 1 and tensor.dtype != torch.bool:
        return "; if these are quantized weights, pass what they stand for"
    return ""


def filter_seed(seed: Any, of_e: torch.device | None = None) -> torch.Tensor | None:
    """The seed as a tensor, or None for 0. So a compiler need not make a program for each integer.

    Raises TypeError or ValueError unless it is an integer, or a 0-d tensor of one on e's device or on the CPU.
    """
    if not isinstance(seed, torch.Tensor):
        if type(seed) is int and seed == 0:  # the default: compilers make a program of its own for 0, without a tensor
            return None
        place = of_e if of_e is not None and of_e.type == "meta" else "cpu"
        if torch.compiler.is_compiling():
            return torch.ones((), dtype=torch.int64, device=place) * seed
        number = integer("filter_seed", seed)
        return torch.tensor(number, device=place) if number else None
    check_tensor("filter_seed", seed)
    if seed.dtype == torch.bool or seed.is_floating_point() or seed.is_complex():
        got = str(seed.dtype).removeprefix("torch.")
        raise TypeError(f"filter_seed: must be an integer or a 0-d tensor of one, got dtype {got}")
    if seed.ndim:
        raise ValueError(f"filter_seed: must be an integer or a 0-d tensor of one, got shape {tuple(seed.shape)}")
    if of_e is not None and seed.device.type != "cpu" and seed.device != of_e:
        raise ValueError(f"filter_seed: must be on the device of e, {of_e}, or on the CPU, got a tensor on {seed.device}")
    return seed


def cast(e: torch.Tensor, c: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Under autocast e in its dtype, as for a linear layer; c in e's dtype; bias too, unless it may stay in float32."""
    kind, dtype = e.device.type, e.dtype
    if kind != "meta" and torch.is_autocast_enabled(kind) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        e = e.to(dtype)
    if bias is not None and (bias.dtype != torch.float32 or dtype == torch.float64):
        bias = bias.to(dtype)
    return e, c if c.dtype == dtype else c.to(dtype), bias


def check_options(dtype: torch.dtype, options: dict[str, Any], return_lse: Any) -> None:
    """Raises what `Options.of` does; under `torch.compile`, which cannot look there, the operator will when it runs."""
    if torch.compiler.is_compiling():
        return
    flag("return_lse", return_lse)
    Options.of(memory.NUMPY_DTYPES[dtype], options)
    for name, value in options.items():
        if isinstance(value, torch.Tensor):  # which passes for an integer there
            raise TypeError(f"{name}: must be an integer, not a tensor, got {value!r}; pass {name}.item()")


def check_shapes(
    e: torch.Tensor, c: torch.Tensor, targets: torch.Tensor, bias: torch.Tensor | None, several: bool = False
) -> None:
    """What `torch.compile` must know to trace, and the baseline to run; elsewhere `arguments.problem` says it, and more."""
    if e.ndim < 1 or c.ndim != 2 or e.shape[-1] != c.shape[1]:
        raise ValueError(f"c: must have shape (V, D) for e (..., D), got {tuple(c.shape)} for e {tuple(e.shape)}")
    if targets.shape[: e.ndim - 1] != e.shape[:-1] or targets.ndim != e.ndim - 1 + several:
        expected = tuple(e.shape[:-1])
        raise ValueError(
            f"targets: must have the shape of e without its last dimension, {expected}, got {tuple(targets.shape)}"
        )
    if bias is not None and bias.shape != c.shape[:1]:
        raise ValueError(f"bias: must have shape (V,) = ({c.shape[0]},), got {tuple(bias.shape)}")
