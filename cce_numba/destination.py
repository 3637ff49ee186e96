"""Where gradients go: the caller's arrays, checked and flattened, and fresh ones for those that are not given."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

from cce_numba import interchange
from cce_numba.arguments import GRADIENTS, Problem
from cce_numba.backend import Gradients
from cce_numba.options import flag


@dataclass(frozen=True, eq=False)
class Destination:
    """What a backward writes to.

    Attributes:
        wanted: names of the gradients.
        given: the caller's own arrays, None where there is none.
        flat: the same as NumPy or CuPy arrays, e as (N, D).
        accumulate: whether gradients are added to what the arrays hold; then all that are wanted are given.
    """

    wanted: frozenset[str]
    given: Gradients
    flat: Gradients
    accumulate: bool

    @staticmethod
    def of(out: Any, accumulate: Any, wanted: frozenset[str], p: Problem) -> Destination:
        """Checks what the caller gave; raises TypeError or ValueError, naming the argument, before anything is computed."""
        accumulate = flag("accumulate", accumulate)
        if out is None:
            out = Gradients()
        elif not isinstance(out, Gradients):
            raise TypeError(f"out: must be cce_numba.Gradients(e=..., c=..., bias=...) or None, got {type(out).__qualname__}")
        flat: dict[str, Any] = {}
        for name in GRADIENTS:
            array = getattr(out, name)
            if array is not None:
                if name not in wanted:
                    reason = "no bias was given" if name == "bias" and p.bias is None else f"wrt leaves {name!r} out"
                    raise ValueError(f"out.{name}: must be None, since {reason}, got {type(array).__qualname__}")
                flat[name] = _checked(name, array, p)
            elif accumulate and name in wanted:
                raise ValueError(
                    f"out.{name}: must be the array to add to, since accumulate=True, got None; pass one, of zeros like {name} "
                    f"if there is none yet (as a tensor's .grad is None at first), or leave {name!r} out of wrt"
                )
        _check_overlap(flat, p)
        return Destination(wanted, out, Gradients(**flat), accumulate)

    def arrays(self, p: Problem) -> Gradients:
        """What a backend writes to: those given, flat, and fresh ones."""
        dtypes = {"e": p.grad_e_dtype, "c": p.grad_c_dtype}
        into = {name: getattr(self.flat, name) for name in self.wanted}
        for name in self.wanted:
            if into[name] is None:
                source = getattr(p, name)
                into[name] = p.xp.empty(source.shape, dtypes.get(name, source.dtype))
        return Gradients(**into)

    def returned(self, p: Problem, into: Gradients) -> Gradients:
        """The caller's own arrays, and the fresh ones of `into` as the caller's kind."""
        result = {name: getattr(self.given, name) for name in self.wanted}
        for name in self.wanted:
            if result[name] is None:
                fresh = getattr(into, name)
                result[name] = p.kind.export(fresh.reshape(p.e_shape) if name == "e" else fresh)
        return Gradients(**result)


def _checked(gradient: str, array: Any, p: Problem) -> Any:
    """The caller's array as a NumPy or CuPy array that shares its memory, flattened to two dimensions or one."""
    name, source = f"out.{gradient}", getattr(p, gradient)
    native = interchange.take_writable(name, array)
    wide = p.compute_dtype
    widened = {"e": p.options.accum_e_fp32, "c": p.options.accum_c_fp32}.get(gradient, False)
    allowed = {wide} if widened else {np.dtype(source.dtype), wide}
    if np.dtype(native.dtype) not in allowed:
        because = f", since accum_{gradient}_fp32=True" if widened and np.dtype(native.dtype) == p.dtype else ""
        raise TypeError(f"{name}: dtype must be {' or '.join(sorted(map(str, allowed)))}{because}, got {native.dtype}")
    shape = p.e_shape if gradient == "e" else tuple(source.shape)
    if tuple(native.shape) != shape:
        raise ValueError(f"{name}: must have the shape of {gradient}, {shape}, got shape {tuple(native.shape)}")
    if (device := interchange.device_of(native)) != p.device:
        raise ValueError(f"{name}: must be on the device of e, {p.device}, got {device}")
    if _may_overlap_itself(native):
        raise ValueError(f"{name}: elements must not share memory, got shape {shape} with strides {native.strides} (bytes)")
    if p.on_device and native.size and shape[-1] > 1 and native.strides[-1] != native.itemsize:
        raise ValueError(
            f"{name}: its last dimension must be contiguous on a device, got a stride of {native.strides[-1]} bytes for "
            f"elements of {native.itemsize}"
        )
    flat = native.reshape(source.shape)
    if native.size and interchange.address(flat) != interchange.address(native):
        raise ValueError(
            f"{name}: its leading dimensions must flatten without a copy, got shape {shape} with strides {native.strides} "
            "(bytes); a contiguous array will do"
        )
    return flat


def _may_overlap_itself(array: Any) -> bool:
    """Whether two of its elements may be one: dimensions must nest, as those of every slice of a contiguous array do.

    >>> _may_overlap_itself(np.zeros((4, 6))[::-2, 1:3]), _may_overlap_itself(np.broadcast_to(np.zeros(6), (3, 6)))
    (False, True)
    """
    if array.size == 0:
        return False
    inner = array.itemsize  # bytes from the first element to the end of the last, of the dimensions so far
    for step, size in sorted((abs(step), size) for size, step in zip(array.shape, array.strides, strict=True) if size > 1):
        if step < inner:
            return True
        inner += (size - 1) * step
    return False


def _check_overlap(flat: dict[str, Any], p: Problem) -> None:
    """No array lies within the addresses of another one that is read or written."""
    outputs = {f"out.{name}": array for name, array in flat.items()}
    inputs = {name: getattr(p, name) for name in GRADIENTS if getattr(p, name) is not None}
    ranges = {name: interchange.byte_range(array) for name, array in (outputs | inputs).items()}
    for one, other in itertools.combinations(ranges, 2):
        (a0, a1), (b0, b1) = ranges[one], ranges[other]
        if one in outputs and max(a0, b0) < min(a1, b1):
            raise ValueError(
                f"{one}: must not overlap {other}, got {a1 - a0} bytes from {a0:#x} and {b1 - b0} from {b0:#x} "
                "(views that interleave count as overlapping)"
            )
