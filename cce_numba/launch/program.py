"""Programs: what a host function launches, recorded once and then run again for other arrays of the same form.

Which kernels run, on what grids, with what numbers, follows from shapes, strides, dtypes and options, and so do all parameters
but addresses. So a host function runs once on blanks (`blank`), and its launches and allocations are noted. What it would
launch for other arrays of that form differs in addresses alone. To fill these in takes a fraction of the function's time.

A program's parameters lie in one block of memory, from which the driver copies them at each launch. What changes in it are
words of 64 bits: addresses, what is made of addresses (tensor maps), and integers that come with each call.
"""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from cce_numba import gpu
from cce_numba.integers import ceil_div
from cce_numba.launch.blank import KNOWN_BYTES, Blank, NotBlank, Place, contiguous_form, form_of, require_memory
from cce_numba.launch.kernel import Kernel, ParameterBlock, is_recorded, told_to
from cce_numba.launch.packing import offsets_of

_MOST = 256  # programs that are kept
_Result = TypeVar("_Result")


class Programs:
    """The programs of one host function, by key."""

    def __init__(self) -> None:
        self._by_key: dict[Hashable, Program | None] = {}

    def clear(self) -> None:
        """Forgets all, for tests that change what host functions read beside their arguments."""
        self._by_key.clear()

    def run(
        self, key: Hashable, arrays: Sequence[Any], function: Callable[..., _Result], integers: tuple[int, ...] = ()
    ) -> _Result:
        """`function(*arrays, *integers)`, or what comes to the same: the program that was recorded of it under this key.

        Args:
            key: all that the function's launches follow from, beside the arrays' forms and CuPy's current device.
            arrays: CuPy arrays, and None where there is none.
            integers: in [0, 2**64), which the function passes to kernels and looks at in no other way.
            function: gets both, or blanks and places for them. It asks CuPy for nothing but allocations (of
                `library` of a blank), and computes by launches alone. If it cannot do without, it is run each time. It returns
                None, or a dataclass some of whose fields are arrays, all of which it has allocated. If it returns arrays in a
                mapping, it is run each time.
        """
        if is_recorded():
            return function(*arrays, *integers)
        device = gpu.cupy().cuda.runtime.getDevice()
        addresses: list[int] = []
        forms: list[Any] = []
        for x in arrays:
            if x is None:
                addresses.append(0)
                forms.append(None)
            else:
                address = x.data.ptr
                addresses.append(address)
                forms.append((x.shape, x.strides, x.dtype, address % KNOWN_BYTES))
        whole_key = device, key, tuple(forms)
        program = self._by_key.get(whole_key, _UNKNOWN)
        if program is _UNKNOWN:
            if len(self._by_key) >= _MOST:
                self._by_key.clear()
            program = self._by_key[whole_key] = _recorded(device, [*arrays, *integers], function)
        return function(*arrays, *integers) if program is None else program.run([*addresses, *integers])


_UNKNOWN: Any = object()


def _recorded(device: int, inputs: Sequence[Any], function: Callable[..., Any]) -> Program | None:
    """The program of a function for inputs of these forms, or None if it has none."""
    recording = _Recording(device)
    blanks = [recording.input(x) for x in inputs]
    try:
        with told_to(recording.launched):
            result = function(*blanks)
        return Program(recording, len(inputs), result)
    except NotBlank:
        return None


class _Recording:
    """What stands for CuPy while a host function runs on blanks.

    Attributes:
        device: CuPy's current one.
        bases: how many arrays and integers there are: those that come in, then those that are allocated.
        bytes_of: bytes of each allocated array, by its number.
        lives: numbers of arrays, in order: each once when it is allocated, and once more when the host code has dropped it.
        steps: in order, `(kernel, grid, numbers)` of each launch, and `(place, bytes)` of what becomes zeros.
    """

    def __init__(self, device: int) -> None:
        self.device, self.bases = device, 0
        self.bytes_of: dict[int, int] = {}
        self.lives: list[int] = []
        self.steps: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        raise NotBlank(name)  # what CuPy has beside this

    def input(self, value: Any) -> Any:
        """What the host function has in place of an array, of an integer, or of None."""
        base = self.bases
        self.bases += 1
        if value is None:
            return None
        if isinstance(value, int):
            return Place(base, 0, None)
        return Blank(self, form_of(value), Place(base, 0, value.data.ptr % KNOWN_BYTES))

    def empty(self, shape: Any, dtype: Any = float) -> Blank:
        """An array that each run allocates."""
        host, base = contiguous_form(shape, dtype), self.bases
        self.bases += 1
        self.bytes_of[base] = host.nbytes
        self.lives.append(base)
        memory = _Memory()
        weakref.finalize(memory, self.lives.append, base)
        return Blank(self, host, Place(base, 0, 0), memory=memory)

    def zeros(self, shape: Any, dtype: Any = float) -> Blank:
        """The same, with zeros."""
        array = self.empty(shape, dtype)
        self.clear(array.place, array.nbytes)
        return array

    def clear(self, place: Place, n_bytes: int) -> None:
        """Notes that so many bytes become zeros."""
        if n_bytes:
            self.steps.append((place, n_bytes))

    def launched(self, kernel: Kernel, grid: tuple[int, int, int], numbers: list[Any]) -> None:
        """Notes a launch."""
        self.steps.append((kernel, grid, numbers))


class _Memory:
    """What ends with the last blank in an array's memory."""


class Program:
    """A recording that can be run, on its device, for arrays of its form."""

    def __init__(self, recording: _Recording, n_inputs: int, result: Any) -> None:
        """`result`: what the host function returned, a dataclass, or None."""
        self._views, self._others = _views_of(result)
        self._kind = type(result)
        self._n_allocated = recording.bases - n_inputs
        self._allocations = _allocations(recording, {base for base, *_ in self._views.values()})
        self._lock = threading.Lock()
        self._mapped: list[tuple[int, int, Callable[[int], tuple[int, ...]]]] = []  # base, offset, what is made of the address
        self._steps: list[tuple[Any, ...]] = []
        self._lay_out(recording)

    def _lay_out(self, recording: _Recording) -> None:
        """Packs the parameters that do not change, and notes where the others go."""
        launches = [step for step in recording.steps if isinstance(step[0], Kernel)]
        self._words = np.zeros(sum(_words(kernel) for kernel, _, _ in launches), np.uint64)
        block, self._kept_alive = self._words.view(np.uint8), []
        words: list[tuple[int, int, int]] = []  # which word is which number, plus what
        first_of: dict[tuple[int, int, Any], int] = {}  # of the numbers that are made of an address
        first_word, n_numbers = 0, recording.bases
        for step in recording.steps:
            if not isinstance(step[0], Kernel):
                place, n_bytes = step
                self._steps.append((None, place.base, place.offset, n_bytes))
                continue
            kernel, grid, numbers = step
            for offset, letter, x in zip(offsets_of(kernel.layout), kernel.layout.format[1:], numbers, strict=True):
                if not isinstance(x, Place):
                    continue
                if letter not in "qQ":
                    raise NotBlank("only words of 64 bits are filled in")
                word = first_word + offset // 8
                if x.then is None:
                    words.append((word, x.base, x.offset))
                    continue
                function, count, index = x.then
                key = x.base, x.offset, function
                if key not in first_of:
                    first_of[key] = n_numbers
                    n_numbers += count
                    self._mapped.append(key)
                words.append((word, first_of[key] + index, 0))
            kernel.layout.pack_into(block, 8 * first_word, *[0 if isinstance(x, Place) else x for x in numbers])
            parameters = ParameterBlock(self._words.ctypes.data + 8 * first_word, kernel.layout.size)
            fixed = kernel.handle(recording.device), *grid, *kernel.block, kernel.smem_bytes
            self._steps.append((fixed, parameters.pointer))
            self._kept_alive.append((kernel, parameters))
            first_word += _words(kernel)
        self._changing, self._numbers, plus = np.array(words, np.int64).reshape(-1, 3).T.copy()
        self._plus = plus.astype(np.uint64)

    def run(self, inputs: list[int]) -> Any:
        """Launches it on CuPy's current stream. `inputs`: the address of each, or the integer; anything for None."""
        cupy = gpu.cupy()
        cuda = cupy.cuda
        numbers = inputs + [0] * self._n_allocated
        memory: dict[int, Any] = {}
        for n_bytes, places in self._allocations:
            block = cuda.alloc(n_bytes)
            start = block.ptr
            for base, offset in places:
                numbers[base], memory[base] = start + offset, block
        for base, offset, function in self._mapped:
            numbers += function(numbers[base] + offset)
        stream, launch = cuda.get_current_stream().ptr, cuda.driver.launchKernel
        with self._lock:
            self._words[self._changing] = np.array(numbers, np.uint64)[self._numbers] + self._plus
            for fixed, *rest in self._steps:
                if fixed is None:
                    base, offset, n_bytes = rest
                    cuda.runtime.memsetAsync(numbers[base] + offset, 0, n_bytes, stream)
                else:
                    launch(*fixed, stream, 0, rest[0])
        if not self._views:
            return None
        made = {
            name: cupy.ndarray(shape, dtype, memory[base] + offset, strides)
            for name, (base, offset, shape, dtype, strides) in self._views.items()
        }
        return self._kind(**made, **self._others)


def _words(kernel: Kernel) -> int:
    """Words of 64 bits that a kernel's parameters take."""
    return ceil_div(kernel.layout.size, 8)


def _views_of(result: Any) -> tuple[dict[str, tuple[Any, ...]], dict[str, Any]]:
    """Of the fields of a dataclass those that are blanks, by base, offset, shape, dtype and strides; and the others."""
    fields = {} if result is None else {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    for x in fields.values():
        if isinstance(x, Mapping):
            for value in x.values():
                require_memory(value)
    blanks = {name: x for name, x in fields.items() if isinstance(x, Blank)}
    views = {name: (x.place.base, x.place.offset, x.shape, x.dtype, x.strides) for name, x in blanks.items()}
    return views, {name: x for name, x in fields.items() if name not in blanks}


def _allocations(recording: _Recording, kept: set[int]) -> list[tuple[int, list[tuple[int, int]]]]:
    """What a run allocates: `(bytes, [(array, offset)])` of each block.

    An array in which a result lies has a block of its own, since results may live longer than one another. All others share
    one, which ends with the run. There an array may lie where another one was that the host code had dropped before.
    """
    bytes_of = recording.bytes_of
    living: dict[int, tuple[int, int]] = {}  # of an array: where it begins and ends
    others: list[tuple[int, int]] = []
    end = 0
    for base in recording.lives:
        if base in kept:
            continue
        if base in living:
            del living[base]
            continue
        size, start = ceil_div(bytes_of[base], KNOWN_BYTES) * KNOWN_BYTES, 0
        for its_start, its_end in sorted(living.values()):
            if start + size <= its_start:
                break
            start = max(start, its_end)
        living[base] = start, start + size
        others.append((base, start))
        end = max(end, start + size)
    own = [(n_bytes, [(base, 0)]) for base, n_bytes in bytes_of.items() if base in kept]
    return [*own, (end, others)] if end else own
