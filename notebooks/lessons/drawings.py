"""Drawings that more than one lesson uses, or that would fill a cell; each returns a `svg.Picture`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from . import svg
from .svg import Picture, rect, text


def told_words(words: Sequence[str], losses: Sequence[float], title: str, width: float = 720) -> Picture:
    """A text, and under each word a bar: how many nats it surprised the model by."""
    parts, x, y = [text(14, 20, title, "bold")], 14.0, 46.0
    scale = 14 / max(4.0, float(np.max(losses)))
    for word, nats in zip(words, losses, strict=True):
        shown = word.replace("\n", "¶").strip() or "␣"
        wide = 6.6 * len(shown) + 6
        if x + wide > width - 14:
            x, y = 14.0, y + 40
        parts.append(text(x, y, shown))
        parts.append(
            rect(x, y + 4, wide - 5, scale * float(nats), "f-g", extra=f'opacity="{0.35 + 0.65 * min(1, nats / 8):.2f}"')
        )
        x += wide
    return Picture(width, y + 34, "".join(parts), title)


def bars(
    rows: Sequence[tuple[str, float]], colour: str, title: str, unit: str, *, width: float = 460, marked: str = ""
) -> Picture:
    """Horizontal bars with a name before and a number after each; the one that is `marked` is drawn full."""
    most = max(value for _, value in rows)
    parts = [text(14, 20, title, "bold")]
    for i, (name, value) in enumerate(rows):
        y = 36 + 20 * i
        parts.append(text(118, y + 9, name, "", anchor="end"))
        strong = not marked or name == marked
        parts.append(
            rect(126, y, max(1.0, (width - 220) * value / most), 12, f"f-{colour}", extra=f'opacity="{1 if strong else 0.45}"')
        )
        parts.append(text(132 + (width - 220) * value / most, y + 9.5, f"{value:.3g} {unit}", "quiet small"))
    return Picture(width, 36 + 20 * len(rows) + 8, "".join(parts), title)


def last_layer() -> Picture:
    """e, c and the logits between them, to the scale of Gemma 2 (2B) with 8192 tokens: widths are true to one another."""
    n, d, v = 8192, 2304, 256000
    unit = 620 / v
    parts = []
    ew, eh, cw = max(6.0, d * unit), n * unit, v * unit
    x0, y0 = 70.0, 70.0
    parts += [rect(x0 - ew - 14, y0, ew, eh, "f-e"), text(x0 - ew - 14, y0 + eh + 14, "e  8192 × 2304", "e")]
    parts += [rect(x0, y0 - ew - 14, cw, ew, "f-c"), text(x0, y0 - ew - 20, "c  256 000 × 2304, on its side", "c")]
    parts += [
        rect(x0, y0, cw, eh, "f-z"),
        text(x0 + cw, y0 + eh + 14, "logits  8192 × 256 000: 8.4 GB in float32", "z", anchor="end"),
    ]
    return Picture(x0 + cw + 16, y0 + eh + 26, "".join(parts), "The last layer of Gemma 2 with 8192 tokens, to scale")


def states(tiles: Sequence[Sequence[float]], merged: Sequence[tuple[float, float]]) -> Picture:
    """Tiles of a row of logits, and under each the running (max, sum) after it."""
    parts, x = [], 14.0
    for i, (tile, (m, s)) in enumerate(zip(tiles, merged, strict=True)):
        wide = 36 * len(tile)
        parts.append(text(x, 18, f"tile {i}", "quiet small"))
        for j, z in enumerate(tile):
            parts.append(rect(x + 36 * j, 24, 36, 24, "f-z", extra='opacity=".25"'))
            parts.append(text(x + 36 * j + 18, 40, f"{z:g}".replace("-", "−"), anchor="middle"))
        parts.append(svg.arrow(x + wide / 2, 52, x + wide / 2, 78, "z"))
        parts.append(rect(x, 80, wide, 40, "f-row", radius=4, extra='opacity=".18"'))
        parts.append(text(x + wide / 2, 96, f"max {m:g}".replace("-", "−"), "bold", anchor="middle"))
        parts.append(text(x + wide / 2, 112, f"sum {s:.3f}", anchor="middle"))
        if i + 1 < len(tiles):
            parts.append(svg.arrow(x + wide + 1, 100, x + wide + 17, 100, "row"))
        x += wide + 18
    return Picture(x, 132, "".join(parts), "Tiles of a row fold into a running (max, sum)")
