"""What a block of threads did between its barriers, and the questions that a lesson asks of it. NumPy alone.

A `Record` is made by `recording.py` in Numba's simulator. Threads of a block have numbers as on a GPU: x fastest. The time
between two barriers is a *step*: step 0 ends with the first barrier. Elements are numbered in row-major order.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

WARP = 32  # threads that issue an instruction together
BANKS, BANK_BYTES = 32, 4  # of shared memory
SECTOR_BYTES = 32  # the smallest piece that global memory delivers


@dataclass(frozen=True)
class Memory:
    """An array that a kernel saw.

    Attributes:
        space: "global" or "shared".
        shape: of the array.
        itemsize: bytes of an element.
    """

    space: str
    shape: tuple[int, ...]
    itemsize: int

    @property
    def size(self) -> int:
        """Elements."""
        return int(np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True)
class Line:
    """A line of source code: the file's last name, the function, the number, the text with its indentation."""

    file: str
    function: str
    number: int
    text: str


@dataclass(frozen=True)
class Race:
    """An element of shared or global memory that a thread wrote while another read or wrote it, with no barrier between."""

    step: int
    array: str
    element: int
    writers: tuple[int, ...]
    readers: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Accesses:
    """Reads and writes of a kernel's arrays, one row each; `record.arrays` names them.

    Attributes:
        thread, step, array, element: (n,) integers.
        write: (n,) bool.
        value: (n,) float64, what was read or written.
        place: (n,) which instruction of the source it was.
    """

    thread: np.ndarray
    step: np.ndarray
    array: np.ndarray
    element: np.ndarray
    write: np.ndarray
    value: np.ndarray
    place: np.ndarray

    def __len__(self) -> int:
        return len(self.thread)

    def where(self, chosen: np.ndarray) -> Accesses:
        """Those of a mask (n,)."""
        return Accesses(*(getattr(self, name)[chosen] for name in self.__dataclass_fields__))


@dataclass(frozen=True, eq=False)
class Record:
    """One block's accesses, registers and lines, from barrier to barrier.

    Attributes:
        kernel: its name.
        block_dim: threads along x, y, z.
        block_idx: which block was watched.
        arrays: what the kernel saw, by name: its parameters, and shared arrays by the variable they were put in.
        accesses: all reads and writes of these by the block's threads.
        registers: for each step, for each thread, the variables that it held when the step ended (scalars and small arrays).
        barriers: for each step, for each thread, the line of the barrier that ended it; None where the thread had ended.
        lines: for each step, the lines that thread 0 ran, in order, each once.
        results: the kernel's array arguments after the whole launch.
    """

    kernel: str
    block_dim: tuple[int, int, int]
    block_idx: tuple[int, int, int]
    arrays: dict[str, Memory]
    accesses: Accesses
    registers: list[list[dict[str, Any]]]
    barriers: list[list[Line | None]]
    lines: list[list[Line]]
    results: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def threads(self) -> int:
        """Threads of the block."""
        return int(np.prod(self.block_dim))

    @property
    def steps(self) -> int:
        """Steps, the last of which ends with the kernel."""
        return len(self.barriers)

    def of(self, array: str, *, write: bool | None = None, step: int | None = None) -> Accesses:
        """The accesses to an array, or only its reads, its writes, those of a step."""
        names = list(self.arrays)
        if array not in self.arrays:
            raise KeyError(f"no array {array!r} was seen; there were {', '.join(names)}")
        a = self.accesses
        chosen = a.array == names.index(array)
        if write is not None:
            chosen &= a.write == write
        if step is not None:
            chosen &= a.step == step
        return a.where(chosen)

    def count(self, *arrays: str, write: bool = False) -> int:
        """Reads, or writes, of these arrays, by all threads of the block."""
        return sum(len(self.of(array, write=write)) for array in arrays)

    def distinct(self, *arrays: str) -> int:
        """Elements of these arrays that were read at least once."""
        return sum(len(np.unique(self.of(array, write=False).element)) for array in arrays)

    def reuse(self, array: str) -> float:
        """How often an element of the array that was read at all was read, on average."""
        return self.count(array) / max(1, self.distinct(array))

    def values(self, array: str, step: int) -> np.ndarray:
        """What stands in a shared array at the end of a step: NaN if nothing was written, of two writers the last."""
        memory = self.arrays[array]
        held = np.full(memory.size, np.nan)
        a = self.of(array, write=True)
        a = a.where(a.step <= step)
        order = np.lexsort((np.arange(len(a)), a.thread, a.step))
        held[a.element[order]] = a.value[order]
        return held.reshape(memory.shape)

    def races(self) -> list[Race]:
        """Where threads met without a barrier: the result depends on who came first."""
        found = []
        a = self.accesses
        order = np.lexsort((a.element, a.array, a.step))
        key = np.stack([a.step[order], a.array[order], a.element[order]], axis=1)
        edges = np.flatnonzero(np.r_[True, np.any(np.diff(key, axis=0), axis=1), True]) if len(key) else [0]
        names = list(self.arrays)
        for start, stop in itertools.pairwise(edges):
            rows = order[start:stop]
            writers = np.unique(a.thread[rows][a.write[rows]])
            readers = np.unique(a.thread[rows][~a.write[rows]])
            if len(writers) and len(np.union1d(writers, readers)) > 1:
                step, array, element = key[start]
                found.append(Race(int(step), names[array], int(element), tuple(map(int, writers)), tuple(map(int, readers))))
        return found

    def stray_barriers(self) -> list[int]:
        """Steps that threads ended at different barriers, which a GPU may answer by hanging."""
        return [step for step, row in enumerate(self.barriers) if len({line for line in row if line is not None}) > 1]

    def requests(self, array: str, *, write: bool | None = None) -> Iterator[Accesses]:
        """The accesses of an array grouped as warps issue them: those of one warp at one instruction.

        Threads of a warp are taken to be in step: a thread's i-th access at an instruction between two barriers goes with the
        other threads' i-th.
        """
        a = self.of(array, write=write)
        if not len(a):
            return
        order = np.lexsort((np.arange(len(a)), a.thread, a.place, a.step))
        a = a.where(order)
        same = (np.diff(a.step) == 0) & (np.diff(a.place) == 0) & (np.diff(a.thread) == 0)
        start = np.flatnonzero(np.r_[True, ~same])
        turn = np.arange(len(a)) - np.repeat(start, np.diff(np.r_[start, len(a)]))
        warp = a.thread // WARP
        order = np.lexsort((a.thread, warp, turn, a.place, a.step))
        keys = np.stack([a.step, a.place, turn, warp], axis=1)[order]
        edges = np.flatnonzero(np.r_[True, np.any(np.diff(keys, axis=0), axis=1), True])
        for first, last in itertools.pairwise(edges):
            yield a.where(order[first:last])

    def bank_conflicts(self, array: str, *, write: bool | None = None) -> Conflicts:
        """How a shared array's requests fall on the 32 banks of 4 bytes."""
        itemsize = self.arrays[array].itemsize
        requests = wavefronts = worst = 0
        for a in self.requests(array, write=write):
            together = WARP * BANK_BYTES // max(itemsize, BANK_BYTES)  # threads whose words are served at once
            needed = 0
            for half in np.unique(a.thread % WARP // together):
                elements = a.element[a.thread % WARP // together == half]
                words = np.unique(elements * itemsize // BANK_BYTES)
                needed += int(np.bincount(words % BANKS).max())
            requests, wavefronts, worst = requests + 1, wavefronts + needed, max(worst, needed)
        return Conflicts(requests, wavefronts, worst)

    def sectors(self, array: str, *, write: bool | None = None) -> int:
        """Pieces of 32 bytes that a global array's requests touch: one request of a warp asks for each piece once."""
        itemsize = self.arrays[array].itemsize
        return sum(len(np.unique(a.element * itemsize // SECTOR_BYTES)) for a in self.requests(array, write=write))


@dataclass(frozen=True)
class Conflicts:
    """Requests of warps to shared memory, the turns that its banks took to serve them, and the most that one took."""

    requests: int
    wavefronts: int
    worst: int

    @property
    def per_request(self) -> float:
        """1 is free of conflicts."""
        return self.wavefronts / max(1, self.requests)
