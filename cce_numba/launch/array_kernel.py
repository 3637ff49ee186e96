"""Kernels that take arrays: numba's own array arguments, by which a kernel knows shape and strides and indexes with brackets.

Their source runs on a GPU, on CuPy arrays, and in Numba's simulator, on NumPy arrays. On a GPU an `ArrayKernel` is one `Kernel`
for each combination of dtypes, dimensions and layouts that it is launched with. Each is compiled when it is first asked for,
and kept on disk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba.cuda import types

from cce_numba.gpu import SIMULATED
from cce_numba.launch import simulator
from cce_numba.launch.kernel import Kernel, three_dimensions
from cce_numba.launch.packing import array_type, array_values

_SCALARS = {bool: types.boolean, int: types.int64, np.float32: types.float32, np.float64: types.float64}


class DeviceArray:
    """A CuPy array as kernels take it, described once for many launches.

    Attributes:
        kind: its numba type, in a kernel's signature.
        values: the numbers that a kernel is passed.
        owner: the array, which keeps its memory.
    """

    __slots__ = ("kind", "owner", "values")

    def __init__(self, array: Any) -> None:
        self.owner = array
        self.kind = array_type(array.dtype, array.ndim, bool(array.flags.c_contiguous))
        self.values = array_values(array)


def argument(value: Any) -> Any:
    """What launches make of an argument: an array in the form that kernels take, without a copy; other things as they are.

    Launches do it themselves. Host code does it beforehand for arrays that it passes more than once, and for whole records.
    """
    if isinstance(value, tuple):
        items = map(argument, value)
        return type(value)._make(items) if hasattr(value, "_make") else tuple(items)
    if not getattr(value, "ndim", 0):  # scalars, and arrays in that form already
        return value
    return simulator.array_argument(value) if SIMULATED else DeviceArray(value)


class ArrayKernel:
    """A kernel whose signature follows from what it is launched with.

    Arguments are arrays (NumPy's in the simulator, CuPy's on a GPU) of at least one dimension, bools, ints, NumPy scalars of
    float32 or float64, and records and tuples of these.

    Attributes:
        function: the Python function.
        block: threads of a CTA along x, y and z.
        ctas: how many CTAs a multiprocessor must have room for. It bounds the registers of a thread.
        identity: see `Kernel`.
    """

    identity: str | None = None

    def __init__(self, function: Callable[..., None], *, block: int | tuple[int, ...], ctas: int = 1) -> None:
        self.function, self.block, self.ctas = function, three_dimensions(block), ctas
        self._simulated = simulator.kernel(function) if SIMULATED else None
        self._by_key: dict[Any, Kernel] = {}

    def launch(self, grid: int | tuple[int, ...], *arguments: Any) -> None:
        """Launches a grid of CTAs along up to three dimensions; an empty one launches nothing."""
        dimensions = three_dimensions(grid)
        if 0 in dimensions:
            return
        if self._simulated is not None:
            simulator.launch(self._simulated, dimensions, self.block, argument(arguments))
            return
        key: list[Any] = []
        numbers: list[Any] = []
        for value in arguments:
            _take_apart(value, key, numbers)
        kernel = self._by_key.get(tuple(key)) or self._specialise(tuple(key), arguments)
        kernel.launch_flat(dimensions, numbers)

    def _specialise(self, key: tuple[Any, ...], arguments: tuple[Any, ...]) -> Kernel:
        """The kernel for arguments of these kinds, which may be there before anything is compiled."""
        kernel = Kernel(self.function, tuple(map(_kind_of, arguments)), threads=self.block, ctas=self.ctas)
        kernel.identity = self.identity
        return self._by_key.setdefault(key, kernel)


def _take_apart(value: Any, key: list[Any], numbers: list[Any]) -> None:
    """Appends to the key what an argument's numba type follows from, and to the numbers what the kernel is passed for it."""
    if isinstance(value, DeviceArray):
        key.append(id(value.kind))  # `array_type` keeps its types, so that each has one number; hashing them takes longer
        numbers.extend(value.values)
    elif isinstance(value, tuple):
        key += type(value), len(value)
        for item in value:
            _take_apart(item, key, numbers)
    elif getattr(value, "ndim", 0):
        _take_apart(DeviceArray(value), key, numbers)
    else:
        key.append(type(value))
        numbers.append(value)


def _kind_of(value: Any) -> Any:
    """The numba type of an argument."""
    if isinstance(value, tuple):
        kinds = [_kind_of(item) for item in value]
        return types.NamedTuple(kinds, type(value)) if hasattr(value, "_fields") else types.Tuple(tuple(kinds))
    if isinstance(value, DeviceArray):
        return value.kind
    return DeviceArray(value).kind if getattr(value, "ndim", 0) else _SCALARS[type(value)]
