"""Blanks: arrays that have a form and no memory. Host code that runs on them tells what it would launch at any addresses.

Their addresses are places: the number of an array, and a distance in bytes. Host code may add to a place or take away from it,
and ask for its remainder, where that is known. All else that would need an address, or what is in an array, raises `NotBlank`.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

KNOWN_BYTES = 256  # of an array's address the remainder of this is known; allocations begin at multiples of it


class NotBlank(Exception):
    """Host code asked a blank for what only an array with memory has. So it must run on that."""


class Place:
    """An address that is not known yet, or what follows from it.

    Attributes:
        base: the number of the array that it is in, or of a number that comes with each call.
        offset: bytes from the array's beginning.
        beginning: the remainder of the array's address, divided by KNOWN_BYTES; None for a number.
        then: `(function, count, index)`, if it stands for the integer of this index, out of `count` that the function makes of
            the address; None for the address itself.
    """

    __slots__ = ("base", "beginning", "offset", "then")

    def __init__(self, base: int, offset: int, beginning: int | None, then: Any = None) -> None:
        self.base, self.offset, self.beginning, self.then = base, offset, beginning, then

    def __add__(self, step: int) -> Place:
        if self.then is not None:
            raise NotBlank
        return Place(self.base, self.offset + int(step), self.beginning)

    __radd__ = __add__

    def __sub__(self, step: int) -> Place:
        return self + -step

    def __mod__(self, divisor: int) -> int:
        if self.beginning is None or self.then is not None or KNOWN_BYTES % divisor:
            raise NotBlank
        return (self.beginning + self.offset) % divisor

    def mapped(self, function: Callable[[int], tuple[int, ...]], count: int) -> tuple[Place, ...]:
        """The `count` integers of 64 bits that the function will make of the address."""
        return tuple(Place(self.base, self.offset, None, (function, count, i)) for i in range(count))

    def _refuse(self, *others: Any) -> Any:
        raise NotBlank

    __bool__ = __int__ = __index__ = __eq__ = __lt__ = __le__ = __gt__ = __ge__ = __rsub__ = __floordiv__ = __mul__ = _refuse
    __hash__ = None  # type: ignore[assignment]


class Blank:
    """As much of a CuPy array as follows from its form.

    library: what stands for CuPy among blanks.
    """

    def __init__(self, library: Any, host: np.ndarray, start: Place, origin: int | None = None, memory: Any = None) -> None:
        """`host`: a NumPy array of the form, never touched, in memory whose `origin` stands for the place `start`.

        `memory`: any object, which lives as long as the blank or a view of it does.
        """
        self.library, self._host, self._start, self._memory = library, host, start, memory
        self._origin = _address(host) if origin is None else origin

    @property
    def place(self) -> Place:
        """Of its first element."""
        return self._start + (_address(self._host) - self._origin)

    @property
    def data(self) -> Any:
        """Its address, as CuPy gives it, and what fills its memory."""
        return SimpleNamespace(ptr=self.place, memset_async=self._memset)

    @property
    def device(self) -> Any:
        """That on which the host code is recorded."""
        return SimpleNamespace(id=self.library.device)

    def __getattr__(self, name: str) -> Any:
        if name in ("shape", "dtype", "strides", "itemsize", "ndim", "size", "nbytes", "flags"):
            return getattr(self._host, name)
        raise NotBlank(name)

    def __getitem__(self, key: Any) -> Blank:
        if isinstance(key, int):
            key = (key, ...)  # an array, even of one element
        return self._view(self._host[key])

    def __len__(self) -> int:
        return len(self._host)

    def view(self, dtype: Any) -> Blank:
        """The same bytes as other numbers."""
        return self._view(self._host.view(dtype))

    def reshape(self, *shape: Any) -> Blank:
        """A view; raises NotBlank where that may be a copy."""
        if not self._host.flags.c_contiguous:
            raise NotBlank
        return self._view(self._host.reshape(*shape))

    def _view(self, host: np.ndarray) -> Blank:
        return Blank(self.library, host, self._start, self._origin, self._memory)

    def _memset(self, value: int, n_bytes: int) -> None:
        if value != 0:
            raise NotBlank
        self.library.clear(self.place, n_bytes)

    def _refuse(self, *others: Any) -> Any:
        raise NotBlank

    __setitem__ = __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __neg__ = __abs__ = _refuse
    __eq__ = __ne__ = __bool__ = __iter__ = _refuse
    __hash__ = None  # type: ignore[assignment]


class _Withheld:
    """What refuses all that is asked of it, but whether it is None, which it is not."""

    def __getattr__(self, name: str) -> Any:
        if name == "__wrapped__":  # whoever looks through modules, as doctest does, asks whether it stands for a function
            raise AttributeError(name)
        raise NotBlank(name)

    def _refuse(self, *others: Any) -> Any:
        raise NotBlank

    __bool__ = __len__ = __iter__ = __getitem__ = __eq__ = __ne__ = __int__ = __index__ = __float__ = _refuse
    __hash__ = None  # type: ignore[assignment]


WITHHELD: Any = _Withheld()  # in place of what a program is not told of


def form_of(array: Any) -> np.ndarray:
    """A NumPy array of an array's form, not to be touched: there is no memory behind it."""
    return _without_memory(array.shape, array.dtype, array.strides)


def contiguous_form(shape: Any, dtype: Any) -> np.ndarray:
    """The same of a new array."""
    shape, dtype = (shape,) if isinstance(shape, int) else tuple(shape), np.dtype(dtype)
    steps = [dtype.itemsize]
    for size in reversed(shape[1:]):
        steps.append(steps[-1] * max(size, 1))
    return _without_memory(shape, dtype, tuple(reversed(steps)) if shape else ())


def _without_memory(shape: tuple[int, ...], dtype: Any, strides: tuple[int, ...]) -> np.ndarray:
    return np.lib.stride_tricks.as_strided(np.empty(1, dtype), shape, strides)


def require_memory(array: Any) -> None:
    """Raises NotBlank for a blank: for host code that goes on to read an array by something else than a launch."""
    if isinstance(array, Blank):
        raise NotBlank


def _address(host: np.ndarray) -> int:
    return int(host.__array_interface__["data"][0])
