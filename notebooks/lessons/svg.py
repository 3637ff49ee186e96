"""Small functions that write SVG: each returns a piece of text; `Picture` puts pieces on paper."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from html import escape

from .style import css

_numbers = itertools.count(1)


def number(x: float) -> str:
    """As short as it gets.

    >>> number(3.0), number(0.123456)
    ('3', '0.12')
    """
    return f"{x:.2f}".rstrip("0").rstrip(".")


def rect(x: float, y: float, width: float, height: float, classes: str = "", *, radius: float = 0, extra: str = "") -> str:
    """A rectangle, its upper left corner at (x, y)."""
    rounded = f' rx="{number(radius)}"' if radius else ""
    return (
        f'<rect x="{number(x)}" y="{number(y)}" width="{number(width)}" height="{number(height)}"{rounded}'
        f' class="{classes}"{" " + extra if extra else ""}/>'
    )


def text(x: float, y: float, words: object, classes: str = "", *, anchor: str = "start", extra: str = "") -> str:
    """Words whose baseline begins at (x, y), or is centred there or ends there: anchor "middle" or "end"."""
    placed = "" if anchor == "start" else f' text-anchor="{anchor}"'
    at = f'x="{number(x)}" y="{number(y)}"{placed} class="{classes}"'
    return f"<text {at}{' ' + extra if extra else ''}>{escape(str(words))}</text>"


def line(x1: float, y1: float, x2: float, y2: float, classes: str = "l-line", *, width: float = 1, extra: str = "") -> str:
    """A line from (x1, y1) to (x2, y2)."""
    ends = f'x1="{number(x1)}" y1="{number(y1)}" x2="{number(x2)}" y2="{number(y2)}"'
    return f'<line {ends} class="{classes}" stroke-width="{number(width)}"{" " + extra if extra else ""}/>'


def path(d: str, classes: str = "l-ink", *, width: float = 1, extra: str = "") -> str:
    """A path by SVG's own language, without a fill."""
    return f'<path d="{d}" fill="none" class="{classes}" stroke-width="{number(width)}"{" " + extra if extra else ""}/>'


def arrow(x1: float, y1: float, x2: float, y2: float, classes: str = "quiet", *, width: float = 1.2) -> str:
    """A line that ends in a small head."""
    length = max(1e-9, ((x2 - x1) ** 2 + (y2 - y1) ** 2) ** 0.5)
    ux, uy = (x2 - x1) / length, (y2 - y1) / length
    left, right = (x2 - 6 * ux - 3 * uy, y2 - 6 * uy + 3 * ux), (x2 - 6 * ux + 3 * uy, y2 - 6 * uy - 3 * ux)
    corners = " ".join(f"{number(x)},{number(y)}" for x, y in ((x2, y2), left, right))
    shaft = line(x1, y1, x2 - 5 * ux, y2 - 5 * uy, f"l-{classes}", width=width)
    return shaft + f'<polygon points="{corners}" class="f-{classes}"/>'


@dataclass
class Picture:
    """Pieces on paper of a size in pixels; Jupyter shows it. `title` is read out where it cannot be seen."""

    width: float
    height: float
    body: str
    title: str
    rules: str = ""  # further CSS, in which SCOPE stands for this picture

    def svg(self) -> str:
        """The file's text."""
        name = f"picture{next(_numbers)}"
        size = f'viewBox="0 0 {number(self.width)} {number(self.height)}" width="{number(self.width)}"'
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} height="{number(self.height)}" class="{name}" role="img"'
            f' style="max-width:100%;height:auto"><title>{escape(self.title)}</title>'
            f"<style>{css('.' + name)}{self.rules.replace('SCOPE', '.' + name)}</style>"
            f"{rect(0, 0, self.width, self.height, 'f-paper', radius=6)}{self.body}</svg>"
        )

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        return {"image/svg+xml": self.svg(), "text/plain": self.title}
