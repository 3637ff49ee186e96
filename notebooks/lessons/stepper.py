"""The stepper: runs a kernel in Numba's simulator, and shows a block of threads at work, from barrier to barrier.

`walk` takes a kernel that stands in a notebook. `shipped.py` has walks through the package's own kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import worker
from .budget import Comparison, compare
from .record import Record
from .scene import Frame, Panel, Scene, legend
from .svg import Picture

MOST_PICKED = 32  # threads that a reader may choose one of: as many as a number has bits in JavaScript


@dataclass(frozen=True)
class Shown:
    """An array in the picture.

    Attributes:
        array: its name in the record.
        colour: of `style.COLOURS`.
        turned: drawn with columns as rows.
        title: else its name.
        words: cells hold the numbers, in so many decimals; None for no numbers.
    """

    array: str
    colour: str
    turned: bool = False
    title: str = ""
    words: int | None = None


# (variables of a thread, its x, its y) -> (row, column, value) of the results that it has in registers
Sums = Callable[[Mapping[str, Any], int, int], Iterable[tuple[int, int, float]]]


@dataclass(frozen=True)
class Rows:
    """A table beside the result: one row for each row of the result's tile, a column for each of some shared arrays."""

    columns: Mapping[str, str]  # shared array -> title
    first: Callable[[Mapping[str, Any]], int]  # variables of thread 0 -> the result's row that the table begins with
    decimals: int = 2


@dataclass(frozen=True)
class Layout:
    """What of a record is drawn: a product's two operands at the left and at the top, the result between them.

    Attributes:
        left, top: the operands, the left one with the sum's terms as columns, the top one with them as rows.
        result: how the result is called, and its colour.
        shape: of the result, (rows, columns); that of the array it is stored in, if it is.
        sums: what threads have of it in registers.
        stored: the array that the result is written to, if it is one of this shape.
        shared: arrays in shared memory.
        rows: the table of the running state of rows.
        bits: an array of bytes of which each bit is a column of the result, and the row of it that this block writes.
        tile: variables of thread 0 -> (row, column, rows, columns) of each part of the result that the block works on.
        say: array -> what it means when it is written, or several phrases that take turns; of several arrays, the first is
            the caption.
        say_read: array -> what it means when it is read, in steps of which `say` says nothing; of several arrays, all.
        begins: the caption of the first step, where all of them may be written.
        decimals: of the numbers in the result.
    """

    left: Shown
    top: Shown
    result: tuple[str, str]
    shape: tuple[int, int] | None = None
    sums: Sums | None = None
    stored: Shown | None = None
    shared: Sequence[Shown] = ()
    rows: Rows | None = None
    bits: tuple[str, int] | None = None
    tile: Callable[[Mapping[str, Any]], Sequence[tuple[int, int, int, int]]] | None = None
    say: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    say_read: Mapping[str, str] = field(default_factory=dict)
    begins: str = ""
    decimals: int = 1


@dataclass(frozen=True, eq=False)
class Walk:
    """A record and its picture. In Jupyter it is the picture with a slider; `still` is one step of it."""

    record: Record
    scene: Scene

    def still(self, step: int) -> Picture:
        """The picture of a step, counted from 0; negative ones from the end."""
        return self.scene.still(step % self.record.steps)

    def step_that_writes(self, array: str, which: int = 0) -> int:
        """The number of the `which`-th step in which an array is written."""
        return int(np.unique(self.record.of(array, write=True).step)[which])

    def compare(self, **budget: float) -> Comparison:
        """Counted against the paper-and-pencil budget: `compare(e=40)` for reads of e, `compare(write_z=9)` for writes of z."""
        return compare(self.record, budget)

    def _repr_html_(self) -> str:
        return self.scene.html()

    def __repr__(self) -> str:
        return f"{self.scene.title}: {self.record.steps} steps"


def record(kernel: Any, grid: Any, block_dim: Any, arguments: dict[str, Any], block: tuple[int, ...] = (0, 0)) -> Record:
    """Runs a `cuda.jit` kernel of a notebook in the simulator, with copies of the arrays, and records one block.

    arguments: by name, in the kernel's order. grid, block_dim: as in `kernel[grid, block_dim](...)`. block: (x, y) of the grid.
    """
    return worker.record(kernel, grid, block_dim, arguments, block)


def walk(
    kernel: Any, grid: Any, block_dim: Any, arguments: dict[str, Any], layout: Layout, block: tuple[int, ...] = (0, 0)
) -> Walk:
    """`record`, drawn."""
    return drawn(record(kernel, grid, block_dim, arguments, block), layout)


def drawn(record: Record, layout: Layout) -> Walk:
    """The picture of a record."""
    return Walk(record, _Drawing(record, layout).scene())


CELL = 21.0
_LEFT, _TOP, _GAP = 34.0, 34.0, 30.0


class _Drawing:
    """Panels are placed once; then each step becomes a frame."""

    def __init__(self, record: Record, layout: Layout) -> None:
        self.record, self.layout = record, layout
        self.panels: dict[str, Panel] = {}
        self.shown: dict[str, Shown] = {}
        self.raced = {(race.step, race.array, race.element) for race in record.races()}
        rows, columns = layout.shape or self._shape(layout.stored or layout.left)
        inner = self._shape(layout.left)[1]
        x0, y0 = _LEFT + inner * CELL + _GAP, _TOP + inner * CELL + _GAP
        self._add("left", layout.left, _LEFT, y0, note=f"{rows} × {inner}")
        turned = ", drawn on its side" if layout.top.turned else ""
        self._add("top", layout.top, x0, _TOP, note=f"{columns} × {inner}{turned}" if turned else f"{inner} × {columns}")
        title, colour = layout.result
        words = (7.5 if layout.decimals < 2 else 6.6) if layout.sums or layout.stored else 0
        self._panel("result", title, colour, x0, y0, rows, columns, words=words)
        self.panels["result"].below = True
        if layout.stored:
            self.shown["result"] = layout.stored
        x, bottom = self.panels["result"].right, self.panels["result"].bottom + 18
        if layout.bits:
            self._panel("bits", "survivor bits", "survivor", x0, bottom + 18, 1, columns)
            self.panels["bits"].below = True
            bottom += 50
        if layout.rows:
            width = 42.0
            self.panels["rows"] = Panel(
                "rows", "", "row", x + 14, y0, rows, len(layout.rows.columns), width, CELL,
                words=8.5, column_names=list(layout.rows.columns.values()),
            )  # fmt: skip
            x = self.panels["rows"].right
        self._threads()
        y, at = bottom + 26, _LEFT
        for shown in layout.shared:
            rows, columns = self._shape(shown)
            panel = self._add(
                shown.array, shown, at, y, cell=21.0 if shown.words is not None else 14.0, note=f"{rows} × {columns}, shared"
            )
            at, bottom = max(panel.right, at + 6.5 * len(panel.title + panel.note)) + _GAP, max(bottom, panel.bottom)
        self.width, self.height = max(x, at - _GAP) + 16, bottom + 42
        self.before: dict[tuple[int, int], float] = {}

    def _shape(self, shown: Shown) -> tuple[int, int]:
        shape = self.record.arrays[shown.array].shape
        rows, columns = shape if len(shape) == 2 else (1, *shape)
        return (columns, rows) if shown.turned else (rows, columns)

    def _add(self, name: str, shown: Shown, x: float, y: float, cell: float = CELL, note: str = "") -> Panel:
        self.shown[name] = shown
        rows, columns = self._shape(shown)
        words = 0.0 if shown.words is None else 7.0
        return self._panel(
            name, shown.title or shown.array, shown.colour, x, y, rows, columns, words=words, cell=cell, note=note
        )

    def _panel(
        self, name: str, title: str, colour: str, x: float, y: float, rows: int, columns: int, *,
        words: float = 0, cell: float = CELL, note: str = "",
    ) -> Panel:  # fmt: skip
        self.panels[name] = Panel(name, title, colour, x, y, rows, columns, cell, cell, words=words, note=note)
        return self.panels[name]

    def _threads(self) -> None:
        across, down = self.record.block_dim[:2]
        top, left = self.panels["top"], self.panels["left"]
        room = min(left.right - _LEFT, top.bottom - _TOP) - 20
        size = max(7.0, min(26.0, room / max(across, down)))
        self.panels["threads"] = Panel(
            "threads", "threads", "thread", _LEFT, _TOP, down, across, size, size, words=min(9.0, size * 0.45),
            note=f"{down} × {across}",
        )  # fmt: skip

    def scene(self) -> Scene:
        record = self.record
        pick = "threads" if record.threads <= MOST_PICKED else None
        if pick:
            self.panels["threads"].only_moving = "click one: its accesses alone"
        block = ", ".join(map(str, record.block_idx[:2]))
        frames = [self._frame(step) for step in range(record.steps)]
        title, width = f"{record.kernel}, block ({block})", max(self.width, legend(frames)[1])
        return Scene(title, width, self.height, list(self.panels.values()), frames, pick)

    def _frame(self, step: int) -> Frame:
        record, layout = self.record, self.layout
        states: dict[str, str] = {}
        words: dict[str, list[str]] = {}
        touched: dict[str, dict[int, tuple[int, int]]] = {}
        for name, shown in self.shown.items():
            states[name], touched[name] = self._states(self.panels[name], shown, step)
            if shown.words is not None and record.arrays[shown.array].space == "shared":
                words[name] = _numbers(self._turned(record.values(shown.array, step), shown), shown.words)
        held = record.registers[step]
        if layout.sums or layout.stored:
            states["result"], words["result"], own = self._result(step, states.get("result"))
            touched["result"] = {**own, **touched.get("result", {})}
        if layout.rows:
            states["rows"], words["rows"] = self._rows(step)
        if layout.bits:
            states["bits"] = self._bits(step)
        active = np.unique(record.accesses.thread[record.accesses.step == step])
        states["threads"] = "".join("s" if t in active else "." for t in range(record.threads))
        words["threads"] = [str(t) for t in range(record.threads)]
        outlines = []
        known = next((h for h in held if h), None) or next(
            (h for rows in reversed(record.registers[: step + 1]) for h in rows if h), None
        )
        if layout.tile and known is not None:
            outlines = [outline for part in layout.tile(known) for outline in self._outlines(*part)]
        ends = next((line for line in record.barriers[step] if line is not None), None)
        return Frame(states, words, touched, outlines, self._caption(step, ends), record.lines[step], ends)

    def _turned(self, values: np.ndarray, shown: Shown) -> np.ndarray:
        values = values if values.ndim == 2 else values[None]
        return values.T if shown.turned else values

    def _states(self, panel: Panel, shown: Shown, step: int) -> tuple[str, dict[int, tuple[int, int]]]:
        """Letters of an array's cells, and which threads touched them in this step."""
        a = self.record.of(shown.array)
        letters = np.full(panel.cells, ".", dtype="<U1")
        letters[self._cells(shown, np.unique(a.element[a.step < step]))] = "s"
        now = a.where(a.step == step)
        masks: dict[int, tuple[int, int]] = {}
        for cell, thread, write in zip(
            self._cells(shown, now.element).tolist(), now.thread.tolist(), now.write.tolist(), strict=True
        ):
            read, written = masks.get(cell, (0, 0))
            bit = 1 << thread
            masks[cell] = (read, written | bit) if write else (read | bit, written)
        for cell, (read, written) in masks.items():
            letters[cell] = "b" if read and written else "w" if written else "r"
        for race_step, array, element in self.raced:
            if (race_step, array) == (step, shown.array):
                letters[self._cells(shown, np.array([element]))] = "x"
        return "".join(letters), masks if self.record.threads <= MOST_PICKED else {}

    def _cells(self, shown: Shown, elements: np.ndarray) -> np.ndarray:
        if not shown.turned:
            return elements
        columns, rows = self._shape(shown)  # of the array itself
        return elements % columns * rows + elements // columns

    def _result(self, step: int, stored: str | None) -> tuple[str, list[str], dict[int, tuple[int, int]]]:
        """Letters and words of the result's cells, and which threads hold them."""
        panel, layout = self.panels["result"], self.layout
        own: dict[int, tuple[int, int]] = {}
        letters, words = list(stored or "." * panel.cells), [""] * panel.cells
        sums: dict[tuple[int, int], float] = {}
        if layout.sums:
            across = self.record.block_dim[0]
            for thread, held in enumerate(self.record.registers[step]):
                if held:
                    for row, column, value in layout.sums(held, thread % across, thread // across):
                        if 0 <= row < panel.rows and 0 <= column < panel.columns:
                            sums[row, column] = value
                            own[row * panel.columns + column] = 0, 1 << thread
            if not any(self.record.registers[step]) and layout.stored:
                sums = self.before
            for row, column in self.before:
                if (row, column) not in sums:
                    letters[row * panel.columns + column] = "o" if not layout.stored else "."
            for (row, column), value in sums.items():
                cell = row * panel.columns + column
                if letters[cell] == ".":
                    letters[cell] = "s" if self.before.get((row, column)) == value else "w"
                words[cell] = _short(value, layout.decimals)
            self.before = {**self.before, **sums}
        if layout.stored:
            a = self.record.of(layout.stored.array, write=True)
            for element, value in zip(a.element[a.step <= step], a.value[a.step <= step], strict=True):
                words[self._cells(layout.stored, np.array([element]))[0]] = _short(value, layout.decimals)
        return "".join(letters), words, own if self.record.threads <= MOST_PICKED else {}

    def _rows(self, step: int) -> tuple[str, list[str]]:
        panel, rows = self.panels["rows"], self.layout.rows
        assert rows is not None
        letters, words = ["."] * panel.cells, [""] * panel.cells
        known = next((h for h in reversed([r[0] for r in self.record.registers[: step + 1]]) if h), None)
        if known is None:
            return "".join(letters), words
        first = rows.first(known)
        for column, array in enumerate(rows.columns):
            if array not in self.record.arrays:
                continue
            now = set(self.record.of(array, write=True, step=step).element.tolist())
            seen = set(self.record.of(array, write=False, step=step).element.tolist())
            for i, value in enumerate(self.record.values(array, step).ravel()):
                if 0 <= first + i < panel.rows and not np.isnan(value):
                    cell = (first + i) * panel.columns + column
                    letters[cell] = "w" if i in now else "r" if i in seen else "s"
                    words[cell] = _short(value, rows.decimals)
        return "".join(letters), words

    def _bits(self, step: int) -> str:
        assert self.layout.bits is not None
        array, row = self.layout.bits
        panel, a = self.panels["bits"], self.record.of(self.layout.bits[0], write=True)
        letters = ["."] * panel.columns
        width = self.record.arrays[array].shape[1]
        for element, value, when in zip(a.element, a.value, a.step, strict=True):
            if element // width != row or when > step:
                continue
            for bit in range(8):
                column = element % width * 8 + bit
                if column < panel.columns:
                    letters[column] = ("w" if when == step else "h") if int(value) >> bit & 1 else "."
        return "".join(letters)

    def _outlines(self, row: int, column: int, rows: int, columns: int) -> list[tuple[float, float, float, float]]:
        """Around the tile of the result, and what of the operands belongs to it."""
        left, top, result = self.panels["left"], self.panels["top"], self.panels["result"]
        rows, columns = min(rows, result.rows - row), min(columns, result.columns - column)
        wide, high = columns * CELL, rows * CELL
        return [
            (*left.corner(row, 0), left.right - left.x, high),
            (*top.corner(0, column), wide, top.bottom - top.y),
            (*result.corner(row, column), wide, high),
        ]

    def _caption(self, step: int, ends: Any) -> str:
        record = self.record
        begins = [self.layout.begins] if step == 0 and self.layout.begins else []
        said = begins or self._said(step, self.layout.say, True)[:1] or self._said(step, self.layout.say_read, False)
        counts = []
        seen = dict.fromkeys(shown.array for shown in self.shown.values())
        for write, verb in ((False, "reads"), (True, "writes")):
            parts = []
            for array in seen:
                if number := len(record.of(array, write=write, step=step)):
                    parts.append(f"{array} × {number}")
            if parts:
                counts.append(f"{verb} {', '.join(parts)}")
        races = sorted({array for when, array, _ in self.raced if when == step})
        parts = [
            *(f"{words}." for words in said),
            f"It {' and '.join(counts)}." if counts else "",
            f"RACE in {', '.join(races)}: no barrier stands between who writes and who reads." if races else "",
            f"Then all wait at line {ends.number}." if ends is not None else "Then the block has finished.",
        ]
        return " ".join(part for part in parts if part)

    def _said(self, step: int, phrases: Mapping[str, str | tuple[str, ...]], write: bool) -> list[str]:
        """Phrases of the arrays that are written (or read) in a step; those that take turns do so by the steps that do it."""
        found = []
        for array, phrase in phrases.items():
            if array in self.record.arrays:
                steps = np.unique(self.record.of(array, write=write).step).tolist()
                if step in steps:
                    found.append(phrase if isinstance(phrase, str) else phrase[steps.index(step) % len(phrase)])
        return found


def _short(value: float, decimals: int) -> str:
    """A number in few letters.

    >>> _short(-0.04, 1), _short(float("-inf"), 1), _short(12.345, 2)
    ('0.0', '−∞', '12.35')
    """
    if np.isnan(value):
        return "nan"
    if np.isinf(value) or abs(value) > 1e30:
        return "−∞" if value < 0 else "∞"
    shown = f"{value:.{decimals}f}"
    if float(shown) == 0:
        shown = shown.lstrip("-")
    return shown.replace("-", "−")


def _numbers(values: np.ndarray, decimals: int) -> list[str]:
    return ["" if np.isnan(value) else _short(value, decimals) for value in values.ravel()]
