"""A moving picture of a record: panels of cells, whose states change from step to step, as SVG and as a page with a slider.

A panel is a table of cells: an array, the sums of a tile, the bits of a block, the threads. A frame says, for each panel, the
state of each cell by one letter, and the words in its cells if it has any. The same drawing serves the still picture, in which
states are classes of the cells, and the page, in which a few lines of script set the classes.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from . import svg
from .record import Line
from .style import FONT, MONO, css, light
from .svg import Picture, rect, text

# What a cell's letter means, in the legend's order. "." is a cell that nobody has touched.
STATES = {
    "r": "read in this step",
    "w": "written in this step",
    "b": "both",
    "s": "touched before",
    "x": "race: who came first?",
    "o": "computed, folded, gone",
    "h": "survives",
}


@dataclass
class Panel:
    """A table of cells at (x, y), in a colour of `style.COLOURS`.

    Attributes:
        title: stands above it.
        words: a size in pixels, if cells hold words; 0 if not.
        column_names: stand above it; empty for none.
        note: stands after the title, in a quiet colour.
    """

    name: str
    title: str
    colour: str
    x: float
    y: float
    rows: int
    columns: int
    width: float
    height: float
    words: float = 0
    column_names: Sequence[str] = ()
    note: str = ""
    below: bool = False  # the title stands below
    only_moving: str = ""  # stands below it where scripts run

    @property
    def cells(self) -> int:
        """How many."""
        return self.rows * self.columns

    def corner(self, row: float, column: float) -> tuple[float, float]:
        """Upper left corner of a cell."""
        return self.x + column * self.width, self.y + row * self.height

    @property
    def right(self) -> float:
        """Where it ends."""
        return self.x + self.columns * self.width

    @property
    def bottom(self) -> float:
        """Where it ends."""
        return self.y + self.rows * self.height


@dataclass
class Frame:
    """One step.

    Attributes:
        states: by panel, a letter for each cell.
        words: by panel, a word for each cell.
        touched: by panel, cell -> (bits of the threads that read it, bits of those that wrote it).
        outlines: rectangles (x, y, width, height), as many in each frame.
        caption: what happens.
        lines: of the source, that a thread ran.
        ends: the line of the barrier that ends the step, or None.
    """

    states: dict[str, str]
    words: dict[str, list[str]] = field(default_factory=dict)
    touched: dict[str, dict[int, tuple[int, int]]] = field(default_factory=dict)
    outlines: list[tuple[float, float, float, float]] = field(default_factory=list)
    caption: str = ""
    lines: list[Line] = field(default_factory=list)
    ends: Line | None = None


_numbers = itertools.count(1)
_HERE = Path(__file__).parent
_SCRIPT = (_HERE / "slider.js").read_text(encoding="utf-8")
_PAGE = (_HERE / "slider.css").read_text(encoding="utf-8").replace("FONT", FONT).replace("MONO", MONO)
_FILLED = "rwbsh"  # states in which a cell has its panel's colour
_RULES = (_HERE / "cells.css").read_text(encoding="utf-8") + "".join(
    ",".join(f"SCOPE .p-{name}.{state}" for state in _FILLED) + f"{{fill:{light(name)};fill:var(--{name})}}"
    for name in ("e", "c", "z", "g", "survivor", "row", "thread")
)


@dataclass
class Scene:
    """Panels, and a frame for each step.

    Attributes:
        title: in a few words.
        threads: the panel whose cells are threads, if a reader may choose one by clicking at it.
    """

    title: str
    width: float
    height: float
    panels: list[Panel]
    frames: list[Frame]
    threads: str | None = None

    def still(self, step: int, caption: bool = True) -> Picture:
        """The picture of one step, for places without scripts."""
        frame = self.frames[step]
        body = [self._legend()]
        body += [self._frame_of(panel, False) + self._cells(panel, frame) for panel in self.panels]
        body += [rect(*outline, "outline l-ink", radius=2) for outline in frame.outlines]
        height = self.height
        if caption:
            for words in _wrapped(f"step {step + 1} of {len(self.frames)}: {frame.caption}", int((self.width - 28) / 6.3)):
                body.append(text(14, height + 4, words))
                height += 16
            height += 4
        return Picture(self.width, height, "".join(body), f"{self.title}, step {step + 1} of {len(self.frames)}", _RULES)

    def _cells(self, panel: Panel, frame: Frame) -> str:
        """A panel's cells as they are in a frame, with their words."""
        states = frame.states.get(panel.name, "." * panel.cells)
        words = frame.words.get(panel.name, [""] * panel.cells)
        assert len(states) == panel.cells, f"{panel.name}: {len(states)} states for {panel.cells} cells"
        parts = []
        for i, state in enumerate(states):
            x, y = panel.corner(i // panel.columns, i % panel.columns)
            if state != ".":
                parts.append(rect(x, y, panel.width, panel.height, f"k p-{panel.colour} {state}"))
            if panel.words and words[i]:
                at = x + panel.width / 2, y + panel.height / 2 + panel.words * 0.36
                size = f'style="font-size:{svg.number(panel.words)}px"'
                parts.append(text(*at, words[i], "word over" if state in "wbx" else "word", anchor="middle", extra=size))
        return "".join(parts)

    def _frame_of(self, panel: Panel, moves: bool) -> str:
        """What stays of a panel: its lines and names."""
        x, y, right, bottom = (svg.number(z) for z in (panel.x, panel.y, panel.right, panel.bottom))
        lines = [f"M{svg.number(panel.corner(0, i)[0])} {y}V{bottom}" for i in range(panel.columns + 1)]
        lines += [f"M{x} {svg.number(panel.corner(i, 0)[1])}H{right}" for i in range(panel.rows + 1)]
        parts = [svg.path("".join(lines), "l-line", width=0.8)]
        title = f'<tspan class="bold">{escape(panel.title)}</tspan>' if panel.title else ""
        note = f'<tspan class="quiet" dx="6">{escape(panel.note)}</tspan>' if panel.note else ""
        where = panel.bottom + 14 if panel.below else panel.y - (16 if panel.column_names else 6)
        parts.append(f'<text x="{x}" y="{svg.number(where)}">{title}{note}</text>')
        for column, name in enumerate(panel.column_names):
            parts.append(text(panel.corner(0, column + 0.5)[0], panel.y - 4, name, "quiet small", anchor="middle"))
        if moves and panel.only_moving:
            parts.append(text(panel.x, panel.bottom + 13, panel.only_moving, "quiet small"))
        return "".join(parts)

    def _legend(self) -> str:
        return "".join(
            rect(x, self.height - 23, 11, 11, f"k p-{'survivor' if state == 'h' else 'thread'} {state}")
            + text(x + 16, self.height - 14, STATES[state], "quiet")
            for state, x in legend(self.frames)[0]
        )

    def html(self) -> str:
        """A page's piece with a slider: all that it needs is in it."""
        name = f"stepper{next(_numbers)}"
        scope = f"#{name}"
        outlines = "".join(rect(*outline, "outline l-ink", radius=2) for outline in self.frames[0].outlines)
        panels = "".join(f"<g data-panel>{self._frame_of(panel, True)}</g>" for panel in self.panels)
        size = f'viewBox="0 0 {svg.number(self.width)} {svg.number(self.height)}"'
        look = f'style="max-width:{svg.number(1.15 * self.width)}px" role="img" aria-label="{escape(self.title)}"'
        drawing = (
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} {look}>'
            f"{self._legend()}{panels}<g class='outlines'>{outlines}</g></svg>"
        )
        rules = css(scope, in_page=True) + _RULES.replace("SCOPE", scope) + _PAGE.replace("SCOPE", scope)
        data = json.dumps(self._data(), separators=(",", ":")).replace("</", "<\\/")
        script = _SCRIPT[_SCRIPT.index("function") :]
        return (
            f'<div id="{name}" class="stepper"><style>{rules}</style><div class="bar">'
            '<button type="button" aria-label="one step back">&#9664;</button>'
            f'<input type="range" min="0" max="{len(self.frames) - 1}" value="0" aria-label="step">'
            '<button type="button" aria-label="one step on">&#9654;</button><output></output></div>'
            '<p class="caption">This picture moves where scripts may run: run the cell, or trust the notebook.</p>'
            f'<div class="both">{drawing}<pre></pre></div>'
            f'<script type="application/json">{data}</script><script>({script})("{name}")</script></div>'
        )

    def _data(self) -> dict[str, Any]:
        """What the script needs, with each line of the source once."""
        lines: dict[Line, int] = {}

        def at(line: Line | None) -> int:
            return -1 if line is None else lines.setdefault(line, len(lines))

        frames = []
        for frame in self.frames:
            frames.append(
                {
                    "s": [frame.states.get(panel.name, "." * panel.cells) for panel in self.panels],
                    "w": {i: frame.words[p.name] for i, p in enumerate(self.panels) if p.name in frame.words},
                    "t": {
                        i: [[cell, *masks] for cell, masks in frame.touched[p.name].items()]
                        for i, p in enumerate(self.panels)
                        if frame.touched.get(p.name)
                    },
                    "o": [[round(x, 1) for x in outline] for outline in frame.outlines],
                    "c": frame.caption,
                    "l": [at(line) for line in frame.lines if line != frame.ends],
                    "e": at(frame.ends),
                }
            )
        names = [panel.name for panel in self.panels]
        indents: dict[str, int] = {}
        for line in lines:
            own = len(line.text) - len(line.text.lstrip())
            indents[line.function] = min(own, indents.get(line.function, own))
        return {
            "frames": frames,
            "panels": [[p.x, p.y, p.rows, p.columns, p.width, p.height, p.words, p.colour] for p in self.panels],
            "lines": [[line.function, line.number, line.text[indents[line.function] :]] for line in lines],
            "threads": names.index(self.threads) if self.threads else -1,
        }

    def _repr_html_(self) -> str:
        return self.html()


def legend(frames: Sequence[Frame]) -> tuple[list[tuple[str, float]], float]:
    """The states that occur, each with its place in the legend, and the legend's width."""
    used = {state for frame in frames for states in frame.states.values() for state in states}
    places, x = [], 14.0
    for state, meaning in STATES.items():
        if state in used:
            places.append((state, x))
            x += 32 + 6.4 * len(meaning)
    return places, x


def _wrapped(words: str, width: int) -> list[str]:
    lines = [""]
    for word in words.split():
        if len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
    return lines
