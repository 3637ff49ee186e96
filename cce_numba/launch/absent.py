"""A GPU that is not there, for host code: arrays that only have memory on the host, and launches that are noted and not run.

Which kernels a call launches is found out by making the call on such a GPU, so no list of kernels must be kept in step with the
code. What the arrays hold means nothing.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

from cce_numba import gpu
from cce_numba.launch.kernel import Kernel, recorded

_FAR = 2**60  # added to addresses, so that what host code remembers of one is never used for a real address
_ALIGNMENT_BYTES = 256  # CuPy's
_MULTIPROCESSORS = 132  # sizes of grids follow from it; kernels do not


class Array(np.lib.mixins.NDArrayOperatorsMixin):
    """As much of a CuPy array as host code asks for, around a NumPy array."""

    __module__ = "cupy"  # by this the library of an array is told

    def __init__(self, host: Any) -> None:
        self._host = np.asarray(host)

    @property
    def data(self) -> Any:
        """Its address, as CuPy gives it."""
        ptr = self._host.__array_interface__["data"][0] + _FAR
        return SimpleNamespace(ptr=ptr, memset_async=lambda value, n_bytes: None)

    @property
    def device(self) -> Any:
        """The only one."""
        return SimpleNamespace(id=0)

    def get(self) -> np.ndarray:
        """A copy on the host."""
        return self._host.copy()

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._host, name)
        return _wrapping(attribute) if callable(attribute) else _wrapped(attribute)

    def __getitem__(self, key: Any) -> Any:
        return Array(self._host[_host(key)])  # CuPy gives an array even for one element

    def __setitem__(self, key: Any, value: Any) -> None:
        self._host[_host(key)] = _host(value)

    def __len__(self) -> int:
        return len(self._host)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        return _wrapping(getattr(ufunc, method))(*inputs, **options)


class Library:
    """As much of CuPy as host code asks for: NumPy's functions, of and for `Array`."""

    def __getattr__(self, name: str) -> Any:
        function = getattr(np, name)
        return _wrapping(function) if callable(function) and not isinstance(function, type) else function

    def empty(self, shape: Any, dtype: Any = float) -> Array:
        """At an address that is aligned as CuPy's are; memory that nobody touches is never there."""
        dtype = np.dtype(dtype)
        count = int(np.prod(shape, dtype=np.int64))
        memory = np.empty(count * dtype.itemsize + _ALIGNMENT_BYTES, np.uint8)
        start = -memory.__array_interface__["data"][0] % _ALIGNMENT_BYTES
        return Array(memory[start : start + count * dtype.itemsize].view(dtype).reshape(shape))

    def zeros(self, shape: Any, dtype: Any = float) -> Array:
        """As `empty`: what is in it means nothing."""
        array = self.empty(shape, dtype)
        array._host[...] = 0
        return array

    def asarray(self, array: Any, dtype: Any = None) -> Array:
        """A copy, as if it were sent to the device."""
        host = np.asarray(_host(array), dtype)
        copy = self.empty(host.shape, host.dtype)
        copy._host[...] = host
        return copy


@contextmanager
def absent_gpu(cc: tuple[int, int]) -> Iterator[tuple[Any, list[Kernel]]]:
    """Inside, a GPU of a compute capability seems to be there, and CuPy installed. Not while other threads use a GPU.

    Gives what stands for CuPy, and the list of kernels, in order, of all launches since.
    """
    library = Library()
    driver = importlib.import_module("cuda.bindings.driver")
    tensor_map = SimpleNamespace(opaque=[0] * 16)
    with (
        mock.patch.dict(sys.modules, {"cupy": library}),
        mock.patch.multiple(
            gpu,
            cupy=lambda: library,
            count=lambda: 1,
            current=lambda: gpu.Gpu(cc, _MULTIPROCESSORS),
            bind_context=lambda: None,
        ),
        mock.patch.object(driver, "cuTensorMapEncodeTiled", return_value=(0, tensor_map)),
        np.errstate(all="ignore"),
        recorded() as kernels,
    ):
        yield library, kernels


def _host(value: Any) -> Any:
    """NumPy's arrays in the place of ours, in tuples and lists too."""
    if isinstance(value, Array):
        return value._host
    if isinstance(value, tuple | list):
        return type(value)(map(_host, value))
    return value


def _wrapped(value: Any) -> Any:
    """Ours in the place of NumPy's arrays and numbers."""
    return Array(value) if isinstance(value, np.ndarray | np.generic) else value


def _wrapping(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, for our arrays."""

    @functools.wraps(function, assigned=())
    def wrapping(*args: Any, **kwargs: Any) -> Any:
        out = kwargs.get("out")
        result = function(*map(_host, args), **{name: _host(value) for name, value in kwargs.items()})
        if out is not None:
            return out[0] if isinstance(out, tuple) else out
        return _wrapped(result)

    return wrapping
