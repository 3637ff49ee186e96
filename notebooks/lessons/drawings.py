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
    for at, nats in ((width - 150, 1), (width - 78, 5)):  # to compare with
        parts.append(rect(at, 10, 20, scale * nats, "f-g", extra=f'opacity="{0.35 + 0.65 * min(1, nats / 8):.2f}"'))
        parts.append(text(at + 25, 20, f"{nats} nat{'s' if nats > 1 else ''}", "quiet"))
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
    most, left = max(value for _, value in rows), 24 + 6.6 * max(len(name) for name, _ in rows)
    room = width - left - 90
    parts = [text(14, 20, title, "bold")]
    for i, (name, value) in enumerate(rows):
        y, wide = 36 + 20 * i, max(1.0, room * value / most)
        look = "1" if not marked or name == marked else "0.45"
        parts.append(text(left - 8, y + 9, name, anchor="end"))
        parts.append(rect(left, y, wide, 12, f"f-{colour}", extra=f'opacity="{look}"'))
        parts.append(
            text(left + wide + 6, y + 9.5, f"{value:,.3g} {unit}" if value < 100 else f"{value:,.0f} {unit}", "quiet small")
        )
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


def launch(shape: tuple[int, int], block_dim: tuple[int, int], chosen: tuple[int, int] = (1, 0)) -> Picture:
    """A result of `shape` (rows, columns) under a grid of blocks of (x, y) threads, one of which, by (x, y), is drawn full."""
    rows, columns = shape
    across, down = block_dim
    size, x0, y0, gap = 19.0, 34.0, 64.0, 16.0
    blocks_x, blocks_y = -(-columns // across), -(-rows // down)
    parts = [text(x0, 20, f"a grid of {blocks_x} × {blocks_y} blocks, each of {across} × {down} threads", "bold")]
    parts.append(text(x0, 38, "x runs to the right, along the vocabulary; y runs down, along the tokens", "quiet"))
    for by in range(blocks_y):
        for bx in range(blocks_x):
            left, top = x0 + bx * (across * size + gap), y0 + by * (down * size + gap)
            full = (bx, by) == chosen
            for y in range(down):
                for x in range(across):
                    inside = by * down + y < rows and bx * across + x < columns
                    look = 'fill-opacity=".75"' if full else 'fill-opacity=".22"'
                    extra = look if inside else 'fill-opacity="0" stroke-dasharray="1.5 2.5"'
                    parts.append(rect(left + x * size, top + y * size, size, size, "f-z l-line", extra=extra))
                    if full and inside:
                        words = f"{x},{y}"
                        parts.append(
                            text(left + (x + 0.5) * size, top + (y + 0.5) * size + 2.5, words, "tiny", anchor="middle")
                        )
            edge = 'fill="none" stroke-width="1.4"'
            parts.append(rect(left, top, across * size, down * size, "l-ink" if full else "l-quiet", extra=edge))
            parts.append(text(left, top - 2, f"block {bx},{by}", "tiny quiet"))
    height = y0 + blocks_y * (down * size + gap) + 26
    parts.append(text(x0, height - 10, "dashed: threads beyond the edge of z, which do nothing", "quiet"))
    return Picture(x0 + blocks_x * (across * size + gap) + 14, height, "".join(parts), "A grid of blocks of threads over z")


def requests(asked: Sequence[tuple[str, str, tuple[int, int], Sequence[int]]], itemsize: int = 4) -> Picture:
    """Matrices in memory, and which pieces of 32 bytes a warp's request touches: (title, colour, shape, elements) for each.

    Pieces that are fetched are pale, elements that somebody asked for full.
    """
    per_piece, cell = 32 // itemsize, 9.0
    parts, x, bottom = [], 14.0, 0.0
    for title, colour, (rows, columns), elements in asked:
        wanted = {int(element) for element in elements}
        pieces = {element // per_piece for element in wanted}
        used = len(wanted) / max(1, len(pieces) * per_piece)
        parts.append(text(x, 20, title, "bold"))
        parts.append(text(x, 35, f"{len(pieces)} pieces of 32 bytes, {100 * used:.3g} % of them used", "quiet"))
        for look, wide, numbers in ((".22", per_piece, pieces), ("1", 1, wanted)):
            for i in sorted(numbers):
                at = x + i * wide % columns * cell, 44 + i * wide // columns * cell
                parts.append(rect(*at, wide * cell, cell, f"f-{colour}", extra=f'fill-opacity="{look}"'))
        for row in range(rows + 1):
            parts.append(svg.line(x, 44 + row * cell, x + columns * cell, 44 + row * cell, width=0.6))
        for column in range(0, columns + 1, per_piece):
            parts.append(svg.line(x + column * cell, 44, x + column * cell, 44 + rows * cell, width=0.9))
        bottom = max(bottom, 44 + rows * cell)
        x += max(columns * cell, 240) + 28
    return Picture(x - 8, bottom + 14, "".join(parts), "Pieces of memory that a request of a warp touches")


def banks(asked: Sequence[tuple[str, Sequence[int], int]], colour: str = "c") -> Picture:
    """Words of shared memory by bank, 32 to a row, and which a warp's request wants: (title, elements, words) for each."""
    cell, gap = 8.0, 40.0
    parts, x, bottom = [], 14.0, 0.0
    for title, elements, words in asked:
        wanted = sorted({int(element) for element in elements})
        per_bank = np.bincount(np.array(wanted) % 32, minlength=32)
        rows = -(-words // 32)
        parts.append(text(x, 20, title, "bold"))
        turns = int(per_bank.max())
        parts.append(text(x, 35, f"{turns} turn{'s' if turns > 1 else ''}: as many words are wanted of one bank", "quiet"))
        for i in range(33):
            parts.append(svg.line(x + i * cell, 46, x + i * cell, 46 + rows * cell, width=0.6))
        for i in range(rows + 1):
            parts.append(svg.line(x, 46 + i * cell, x + 32 * cell, 46 + i * cell, width=0.6))
        for word in wanted:
            parts.append(rect(x + word % 32 * cell, 46 + word // 32 * cell, cell, cell, f"f-{colour}"))
        parts.append(text(x, 46 + rows * cell + 12, "bank 0", "quiet small"))
        parts.append(text(x + 32 * cell, 46 + rows * cell + 12, "bank 31", "quiet small", anchor="end"))
        bottom = max(bottom, 46 + rows * cell + 22)
        x += 32 * cell + gap
    return Picture(x - gap + 14, bottom, "".join(parts), "Banks of shared memory that a warp's request falls on")


def sharing(T: int = 4) -> Picture:
    """A tile of T x T results, the rows that it needs, and one element that serves T of them."""
    size, d = 20.0, 8
    x0, y0 = 60 + d * size + 24, 44 + d * size + 24
    parts = [text(14, 20, "one element serves a whole row, or column, of the tile", "bold")]
    for y in range(T):
        for k in range(d):
            mine = y == 1 and k == 3
            look = 'fill-opacity="1"' if mine else 'fill-opacity=".22"'
            parts.append(rect(60 + k * size, y0 + y * size, size, size, "f-e l-line", extra=look))
            look = 'fill-opacity="1"' if y == 2 and k == 3 else 'fill-opacity=".22"'
            parts.append(rect(x0 + y * size, 44 + k * size, size, size, "f-c l-line", extra=look))
    for y in range(T):
        for x in range(T):
            opacity = (0.15, 0.45, 0.85)[(y == 1) + (x == 2)]
            parts.append(rect(x0 + x * size, y0 + y * size, size, size, "f-z l-line", extra=f'fill-opacity="{opacity}"'))
    parts.append(text(60, y0 - 6, "rows of e", "e"))
    parts.append(text(x0 + T * size + 8, 60, "rows of c, on their side", "c"))
    parts.append(text(x0 + T * size + 8, y0 + 14, "tile of z", "z"))
    parts.append(svg.arrow(60 + 4 * size + 4, y0 + 1.5 * size, x0 - 4, y0 + 1.5 * size, "e"))
    parts.append(svg.arrow(x0 + 2.5 * size, 44 + 4 * size + 4, x0 + 2.5 * size, y0 - 4, "c"))
    return Picture(x0 + T * size + 190, y0 + T * size + 20, "".join(parts), "An element of e serves all columns of a tile")


def tiles_and_columns(large: np.ndarray, first: int, tile: int = 128) -> Picture:
    """Which entries of a softmax (tokens, columns) are `large`, and what a filter of tiles computes, and one of columns."""
    rows, columns = large.shape
    cell, x0, y0 = 1.8, 16.0, 44.0
    parts = [text(x0, 18, f"{rows} tokens by {columns} vocabulary entries, from {first} on; a dot is p ≥ 2⁻¹²", "bold")]
    kept = large.any(axis=0)
    for start in range(0, columns, tile):
        left, wide = x0 + start * cell, min(tile, columns - start) * cell
        some = large[:, start : start + tile].any()
        parts.append(rect(left, y0, wide, rows * cell, "f-z l-line", extra=f'fill-opacity="{0.16 if some else 0}"'))
        count = int(kept[start : start + tile].sum())
        told = f"tile: {'computed whole' if some else 'skipped'}; columns: {count} of {tile}"
        parts.append(text(left + 2, y0 - 5, told, "small quiet"))
    edges = np.flatnonzero(np.diff(np.r_[False, kept, False].astype(int)))
    for start, stop in zip(edges[::2], edges[1::2], strict=True):  # runs of neighbours
        left, wide = x0 + start * cell, (stop - start) * cell
        parts.append(rect(left, y0, wide, rows * cell, "f-survivor", extra='fill-opacity=".35"'))
        parts.append(rect(left, y0 + rows * cell + 4, wide, 9, "f-survivor"))
    dots = (
        f"M{svg.number(x0 + column * cell - 0.6)} {svg.number(y0 + (row + 0.5) * cell)}h3" for row, column in np.argwhere(large)
    )
    parts.append(svg.path("".join(dots), "l-z", width=3))
    bottom = y0 + rows * cell + 30
    parts.append(text(x0, bottom, "green: columns that survive", "survivor"))
    return Picture(x0 + columns * cell + 16, bottom + 10, "".join(parts), "Large entries of a softmax in tiles and in columns")


def fragment(lanes: np.ndarray, elements: np.ndarray, chosen: int = 5) -> Picture:
    """A tile whose element (row, column) is in lane `lanes[row, column]`, there as number `elements[row, column]`."""
    rows, columns = lanes.shape
    wide, high, x0, y0 = 58.0, 19.0, 40.0, 46.0
    parts = [
        text(x0, 18, f"a tile of {rows} × {columns} sums: lane, and which of its numbers; lane {chosen} drawn full", "bold")
    ]
    for column in range(columns):
        parts.append(text(x0 + (column + 0.5) * wide, y0 - 5, str(column), "quiet small", anchor="middle"))
    for row in range(rows):
        parts.append(text(x0 - 6, y0 + (row + 0.5) * high + 3, str(row), "quiet small", anchor="end"))
        for column in range(columns):
            lane = int(lanes[row, column])
            full = lane == chosen
            look = f'fill-opacity="{0.9 if full else 0.10 + 0.13 * (lane % 4)}"'
            x, y = x0 + column * wide, y0 + row * high
            parts.append(rect(x, y, wide, high, "f-z l-line", extra=look))
            style = 'style="fill:var(--paper)"' if full else ""
            told = f"{lane} · {int(elements[row, column])}"
            parts.append(text(x + wide / 2, y + high / 2 + 3.5, told, "small", anchor="middle", extra=style))
    return Picture(x0 + columns * wide + 14, y0 + rows * high + 14, "".join(parts), "Which lane of a warp holds which element")


def swizzle(place: np.ndarray, column: int = 2) -> Picture:
    """8 rows of 8 pieces of 16 bytes: where each piece lies plainly, and by `place[row, piece]`; one column drawn full."""
    size, x0, y0 = 30.0, 34.0, 58.0
    parts = []
    for which, (title, where) in enumerate((("as it comes", None), ("swizzled", place))):
        left = x0 + which * (8 * size + 70)
        used = [column if where is None else int(where[row, column]) for row in range(8)]
        turns = max(used.count(slot) for slot in used)
        parts.append(text(left, 18, title, "bold"))
        parts.append(text(left, 34, f"reading a column of pieces takes {turns} turn{'s' if turns > 1 else ''}", "quiet"))
        for slot in range(8):
            parts.append(text(left + (slot + 0.5) * size, y0 - 6, f"{4 * slot}–{4 * slot + 3}", "tiny quiet", anchor="middle"))
        for row in range(8):
            if which == 0:
                parts.append(text(left - 6, y0 + (row + 0.5) * size + 3, str(row), "quiet small", anchor="end"))
            for piece in range(8):
                slot = piece if where is None else int(where[row, piece])
                x, y = left + slot * size, y0 + row * size
                full = piece == column
                parts.append(rect(x, y, size, size, "f-e l-line", extra=f'fill-opacity="{0.85 if full else 0.12}"'))
                style = 'style="fill:var(--paper)"' if full else ""
                parts.append(text(x + size / 2, y + size / 2 + 4, str(piece), "", anchor="middle", extra=style))
        parts.append(text(left + 8 * size, y0 + 8 * size + 14, "banks of a slot stand above it", "tiny quiet", anchor="end"))
    width = x0 + 2 * 8 * size + 70 + 14
    return Picture(width, y0 + 8 * size + 24, "".join(parts), "Pieces of 16 bytes in shared memory, plain and swizzled")


Spans = Sequence[tuple[float, float, str, str]]  # (start, stop, colour, words) of what somebody does


def gantt(
    rows: Sequence[tuple[str, Spans]], title: str, unit: str, *, width: float = 760, until: float = 0,
    key: Sequence[tuple[str, str]] = (),
) -> Picture:  # fmt: skip
    """Who does what when: for each row its name, and its spans, up to a time. key: what colours mean, (colour, words)."""
    end = until or max(stop for _, spans in rows for _, stop, _, _ in spans)
    x0, y0, high, gap = 104.0, 38.0, 20.0, 7.0
    scale = (width - x0 - 30) / end
    parts, x = [text(14, 20, title, "bold")], width - 30
    for colour, words in reversed(key):
        x -= 6.2 * len(words)
        parts.append(text(x, 20, words, "quiet"))
        parts.append(rect(x - 16, 11, 11, 11, f"f-{colour}", extra='fill-opacity=".8"'))
        x -= 32
    bottom = y0 + len(rows) * (high + gap)
    step = 10 ** np.floor(np.log10(end / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if end / (factor * step) <= 8)
    for tick in np.arange(0, end + step / 2, step):
        x = x0 + tick * scale
        if x <= width - 26:
            parts.append(svg.line(x, y0 - 6, x, bottom, width=0.7))
            parts.append(text(x, bottom + 12, f"{tick:,.0f}", "tiny quiet", anchor="middle"))
    parts.append(text(width - 14, bottom + 24, unit, "small quiet", anchor="end"))
    for i, (name, spans) in enumerate(rows):
        y = y0 + i * (high + gap)
        parts.append(text(x0 - 8, y + high / 2 + 4, name, "", anchor="end"))
        for start, stop, colour, words in spans:
            if start >= end:
                continue
            stop = min(stop, end)
            wide = max(0.6, (stop - start) * scale)
            parts.append(
                rect(x0 + start * scale, y, wide, high, f"f-{colour} l-paper", extra='fill-opacity=".8" stroke-width=".6"')
            )
            if words and wide > 5.5 * len(words) + 2:
                style = "" if colour == "line" else 'style="fill:var(--paper)"'  # lines are pale
                parts.append(
                    text(x0 + (start + stop) / 2 * scale, y + high / 2 + 3.5, words, "small", anchor="middle", extra=style)
                )
    return Picture(width, bottom + 34, "".join(parts), title)
