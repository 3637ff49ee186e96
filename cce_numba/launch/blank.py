"""Blanks: arrays that have a form and no memory. Host code that runs on them tells what it would launch at any addresses.

Their addresses are places: the number of an array, and a distance in bytes. Host code may add to a place, and ask for its
remainder, where that is known. All else that would need an address, or what is in an array, raises `NotBlank`.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

KNOWN_BYTES = 16  # of an array's address the remainder of this is known


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

    def __mod__(self, divisor: int) -> int:
        if self.beginning is None or self.then is not None or KNOWN_BYTES % divisor:
            raise NotBlank
        return (self.beginning + self.offset) % divisor

    def mapped(self, function: Callable[[int], tuple[int, ...]], count: int) -> tuple[Place, ...]:
        """The `count` integers of 64 bits that the function will make of the address."""
        return tuple(Place(self.base, self.offset, None, (function, count, i)) for i in range(count))

    def _refuse(self, *others: Any) -> Any:
        raise NotBlank

    __bool__ = __int__ = __index__ = __eq__ = __lt__ = __le__ = __gt__ = __ge__ = __sub__ = __floordiv__ = __mul__ = _refuse
    __hash__ = None  # type: ignore[assignment]


class Blank:
    """As much of a CuPy array as follows from its form.

    library: what stands for CuPy among blanks.
    """

    def __init__(self, library: Any, host: np.ndarray, start: Place, origin: int | None = None) -> None:
        """`host`: a NumPy array of the form, never touched, in memory whose `origin` stands for the place `start`."""
        self.library, self._host, self._start = library, host, start
        self._origin = _address(host) if origin is None else origin

    @property
    def place(self) -> Place:
        """Of its first element."""
        return self._start + (_address(self._host) - self._origin)

    @property
    def data(self) -> Any:
        """Its address, as CuPy gives it."""
        return SimpleNamespace(ptr=self.place)

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
        return Blank(self.library, host, self._start, self._origin)

    def _refuse(self, *others: Any) -> Any:
        raise NotBlank

    __setitem__ = __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __neg__ = __abs__ = _refuse
    __eq__ = __ne__ = __bool__ = __iter__ = _refuse
    __hash__ = None  # type: ignore[assignment]


def form_of(array: Any) -> np.ndarray:
    """A NumPy array of an array's form, not to be touched: there is no memory behind it."""
    one = np.empty(1, array.dtype)
    return np.lib.stride_tricks.as_strided(one, array.shape, array.strides)


def require_memory(array: Any) -> None:
    """Raises NotBlank for a blank: for host code that goes on to read an array by something else than a launch."""
    if isinstance(array, Blank):
        raise NotBlank


def _address(host: np.ndarray) -> int:
    return int(host.__array_interface__["data"][0])
