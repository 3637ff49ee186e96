"""Runs a kernel in Numba's simulator and writes down what one block does: the worker's side of the stepper.

It is imported in a process of its own (`worker.py`), where NUMBA_ENABLE_CUDASIM=1 was set before Numba came. It exchanges three
things of the simulator while it watches: the thread, the kernel's call and shared arrays. The kernel's source stays as it is.
"""

from __future__ import annotations

import contextlib
import itertools
import linecache
import re
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from numba.cuda.simulator import kernel as simulated
from numba.cuda.simulator import kernelapi
from numba.cuda.simulator.cudadrv import devicearray

from cce_numba.launch.simulator import steady

from .record import Accesses, Line, Memory, Record

SMALL = 512  # elements of a local array that a step's registers keep
_NOT_THE_KERNELS = (devicearray.__file__, __file__)
_lock = threading.Lock()


class _Session:
    """What is written down while one block runs."""

    def __init__(self, kernel: str, block_idx: tuple[int, ...], arguments: dict[str, Any], sources: tuple[str, ...]) -> None:
        self.kernel, self.block_idx, self.sources = kernel, block_idx, sources
        self.arrays: dict[str, Memory] = {}
        self.places: dict[tuple[Any, int], int] = {}
        self.expressions: dict[tuple[Any, tuple[int | None, ...]], int] = {}
        self.threads: list[_Thread] = []
        for name, array in arguments.items():
            self.arrays[name] = Memory("global", array.shape, array.itemsize)

    def place_of(self, frame: Any) -> int:
        """The number of the expression that is being run. Not of the byte code: an expression may have several places there."""
        key = frame.f_code, frame.f_lasti
        place = self.places.get(key)
        if place is None:
            position = frame.f_code, next(itertools.islice(frame.f_code.co_positions(), frame.f_lasti // 2, None))
            with _lock:
                place = self.places[key] = self.expressions.setdefault(position, len(self.expressions))
        return place

    def finished(self, results: dict[str, np.ndarray]) -> Record:
        threads = sorted(self.threads, key=lambda thread: thread.thread_id)
        names = list(self.arrays)
        rows = [(thread.thread_id, *row) for thread in threads for row in thread.accesses]
        columns = list(zip(*rows, strict=True)) or [()] * 7
        kinds = np.int64, np.int64, np.int64, np.int64, np.bool_, np.float64, np.int64
        steps = max(len(thread.barriers) for thread in threads)
        for thread in threads:
            ended = steps - len(thread.barriers)
            thread.barriers += [None] * ended
            thread.registers += [{}] * ended
        columns[2] = [names.index(name) for name in columns[2]]  # type: ignore[call-overload]
        return Record(
            kernel=self.kernel,
            block_dim=tuple(threads[0].block_dim),  # type: ignore[arg-type]
            block_idx=self.block_idx,  # type: ignore[arg-type]
            arrays=self.arrays,
            accesses=Accesses(*(np.array(column, kind) for column, kind in zip(columns, kinds, strict=True))),
            registers=[[thread.registers[step] for thread in threads] for step in range(steps)],
            barriers=[[thread.barriers[step] for thread in threads] for step in range(steps)],
            lines=threads[0].lines + [[]] * (steps - len(threads[0].lines)),
            results=results,
        )


_session: _Session | None = None


class _Thread(simulated.BlockThread):
    """A simulated thread that knows its step, and keeps its own list of accesses."""

    def __init__(self, f: Any, manager: Any, block_idx: Any, thread_idx: Any, debug: Any) -> None:
        super().__init__(f, manager, block_idx, thread_idx, debug)
        self.step = 0
        self.accesses: list[tuple[Any, ...]] = []
        self.registers: list[dict[str, Any]] = []
        self.barriers: list[Line | None] = []
        self.lines: list[list[Line]] = [[]]
        self.block_dim = manager._block_dim
        self.watched = _session is not None and tuple(block_idx) == _session.block_idx
        if self.watched and _session is not None:
            _session.threads.append(self)

    def run(self) -> None:
        if self.watched and self.thread_id == 0:
            sys.settrace(self._trace)
        try:
            super().run()
        finally:
            sys.settrace(None)
        if self.watched:
            self.registers.append({})
            self.barriers.append(None)

    def syncthreads(self) -> None:
        if self.watched:
            frame: Any = sys._getframe(1)
            while frame.f_code.co_filename in (kernelapi.__file__, *_NOT_THE_KERNELS):
                frame = frame.f_back
            self.barriers.append(_line(frame.f_code, frame.f_lineno))
            self.registers.append(_held(frame))
            self.lines.append([])
        super().syncthreads()
        self.step += 1

    def note(self, name: str, element: int, write: bool, value: Any) -> None:
        frame: Any = sys._getframe(1)
        while frame.f_code.co_filename in _NOT_THE_KERNELS:
            frame = frame.f_back
        assert _session is not None
        self.accesses.append((self.step, name, element, write, float(value), _session.place_of(frame)))

    def _trace(self, frame: Any, event: str, argument: Any) -> Any:
        assert _session is not None
        if not frame.f_code.co_filename.startswith(_session.sources):
            return None
        if event == "line":
            line = _line(frame.f_code, frame.f_lineno)
            if line not in self.lines[-1]:
                self.lines[-1].append(line)
        return self._trace


def _line(code: Any, number: int) -> Line:
    text = linecache.getline(code.co_filename, number).rstrip()
    return Line(Path(code.co_filename).name, code.co_name, number, text)


def _held(frame: Any) -> dict[str, Any]:
    """The variables of the kernel and of the device functions that it is in; of one name, the innermost."""
    held: dict[str, Any] = {}
    while frame.f_code.co_filename != threading.__file__:
        if frame.f_code.co_filename not in (simulated.__file__, kernelapi.__file__, *_NOT_THE_KERNELS):
            for name, value in frame.f_locals.items():
                _keep(held, name, value)
        frame = frame.f_back
    return held


def _keep(held: dict[str, Any], name: str, value: Any) -> None:
    if name in held:
        return
    if isinstance(value, bool | int | float | np.generic):
        held[name] = value.item() if isinstance(value, np.generic) else value
    elif type(value) is np.ndarray and value.size <= SMALL:
        held[name] = value.copy()
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        for field_name, of_field in zip(value._fields, value, strict=True):
            _keep(held, f"{name}.{field_name}", of_field)


class _WatchedGlobal(devicearray.FakeCUDAArray):
    """An argument of the kernel: the simulator's own array, whose elements are noted as they are read and written."""

    def __init__(self, array: np.ndarray, name: str) -> None:
        super().__init__(array)
        self.__dict__["name"] = name

    def __getitem__(self, index: Any) -> Any:
        element = _element(self.name, self._ary.shape, index)
        value = super().__getitem__(index)
        if element is not None:
            _noting().note(self.name, element, False, value)
        return value

    def __setitem__(self, index: Any, value: Any) -> None:
        element = _element(self.name, self._ary.shape, index)
        super().__setitem__(index, value)
        if element is not None:
            _noting().note(self.name, element, True, value)


class _WatchedShared(np.ndarray):
    """A shared array, likewise."""

    name = ""

    def __array_finalize__(self, parent: Any) -> None:
        self.name = getattr(parent, "name", "")

    def __getitem__(self, index: Any) -> Any:
        element = _element(self.name, self.shape, index)
        value = super().__getitem__(index)
        if element is not None:
            _noting().note(self.name, element, False, value)
        return value

    def __setitem__(self, index: Any, value: Any) -> None:
        element = _element(self.name, self.shape, index)
        super().__setitem__(index, value)
        if element is not None:
            _noting().note(self.name, element, True, value)


def _noting() -> Any:
    """The thread that runs, if it is one of the watched block; else None."""
    thread = threading.current_thread()
    return thread if isinstance(thread, _Thread) and thread.watched else None


def _element(name: str, shape: tuple[int, ...], index: Any) -> int | None:
    """The number of the element that a watched thread is about to touch; None for other threads."""
    if _noting() is None:
        return None
    index = index if isinstance(index, tuple) else (index,)
    if len(index) != len(shape):
        raise TypeError(f"{name}: the stepper follows elements, but {len(index)} of {len(shape)} indices were given")
    element = 0
    for i, n in zip(index, shape, strict=True):
        if not 0 <= i < n:
            raise IndexError(f"{name}: index {tuple(map(int, index))} is outside {tuple(shape)}")
        element = element * n + int(i)
    return element


def _shared_array(shape: Any, dtype: Any, line: tuple[str, int]) -> np.ndarray:
    """A watched one, called by the variable that its line of source puts it in."""
    assert _session is not None
    found = re.search(r"(\w+)\s*=\s*cuda\.shared\.array", linecache.getline(*line))
    name = found[1] if found else f"shared_{line[1]}"
    if name in _session.arrays:
        name = f"{Path(line[0]).stem}.{name}"
    array = np.zeros(shape, dtype).view(_WatchedShared)
    array.name = name
    _session.arrays[name] = Memory("shared", array.shape, array.itemsize)
    return array


@contextlib.contextmanager
def _watching(wanted: Callable[[str, int], bool], block: tuple[int, ...], sources: tuple[str, ...]) -> Iterator[list[Record]]:
    """Within it, launches of kernels that are wanted, by name and how many of that name came before, add to the list."""
    records: list[Record] = []
    seen: dict[str, int] = {}
    call = simulated.FakeCUDAKernel.__call__

    def watched(kernel: Any, *arguments: Any) -> Any:
        global _session
        name = kernel.fn.__name__
        if kernel._device or simulated._get_kernel_context() is not None:
            return call(kernel, *arguments)
        seen[name] = seen.get(name, -1) + 1
        if not wanted(name, seen[name]):
            return call(kernel, *arguments)
        arrays: dict[str, np.ndarray] = {}
        names = kernel.fn.__code__.co_varnames
        prepared = [_prepared(argument, names[i], arrays) for i, argument in enumerate(arguments)]
        _session = _Session(name, (*block, *(0,) * (3 - len(block))), arrays, sources)
        try:
            with steady(_shared_array):  # here, within what the package itself does for each launch
                call(kernel, *prepared)
            records.append(_session.finished({k: v.copy() for k, v in arrays.items()}))
        finally:
            _session = None
        return None

    with (
        mock.patch.object(simulated, "BlockThread", _Thread),
        mock.patch.object(simulated.FakeCUDAKernel, "__call__", watched),
    ):
        yield records


def _prepared(argument: Any, name: str, arrays: dict[str, np.ndarray]) -> Any:
    """The argument, with the arrays in it watched; arrays of a record are named after their fields, and then the record."""
    if isinstance(argument, devicearray.FakeCUDAArray):
        argument = argument._ary
    if isinstance(argument, np.ndarray) and argument.ndim:
        while name in arrays:
            name += "'"
        arrays[name] = argument
        return _WatchedGlobal(argument, name)
    if isinstance(argument, tuple) and hasattr(argument, "_fields"):
        fields = zip(argument._fields, argument, strict=True)
        return type(argument)(*(_prepared(value, _field_name(name, field, arrays), arrays) for field, value in fields))
    if isinstance(argument, tuple):
        return tuple(_prepared(value, f"{name}_{i}", arrays) for i, value in enumerate(argument))
    return argument


def _field_name(record: str, field: str, arrays: dict[str, np.ndarray]) -> str:
    return field if field not in arrays else f"{record}.{field}"


def of_kernel(kernel: Any, grid: Any, block_dim: Any, arguments: dict[str, Any], block: tuple[int, ...]) -> Record:
    """Launches a `cuda.jit` kernel with copies of the arrays, and records one block."""
    copies = [np.array(x) if isinstance(x, np.ndarray) else x for x in arguments.values()]
    source = kernel.fn.__code__.co_filename
    with _watching(lambda name, turn: True, block, (source,)) as records:
        kernel[grid, block_dim](*copies)
    return records[0]


def of_call(
    call: Callable[[], Any], kernel: str, turn: int, block: tuple[int, ...], sources: tuple[str, ...]
) -> tuple[Record, Any]:
    """Runs a function that launches kernels, and records one block of the `turn`-th launch of the one with this name.

    Returns the record and what the function returned. `sources`: beginnings of the names of files whose lines are kept.
    """
    with _watching(lambda name, n: (name, n) == (kernel, turn), block, sources) as records:
        result = call()
    if not records:
        raise ValueError(f"{kernel} was not launched {turn + 1} times")
    return records[0], result
