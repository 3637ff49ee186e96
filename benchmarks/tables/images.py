"""What the pictures have in common: how they are written, and the colour of their text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

TEXT = "#757f89"  # visible on white and on black
_PNG_DPI = 160


def save(figure: Callable[[], Any], path: Path) -> list[Path]:
    """Makes the figure and writes `path` with the suffixes .svg and .png, without a background; returns both paths.

    Matplotlib makes the same bytes each time. The SVG's text stands in it as it is.
    """
    import matplotlib

    settings: dict[str, Any] = {"svg.fonttype": "none", "svg.hashsalt": path.name, "font.family": "sans-serif"}
    colours = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    with matplotlib.rc_context(settings | dict.fromkeys(colours, TEXT)):
        made = figure()
        path.parent.mkdir(parents=True, exist_ok=True)
        svg, png = path.with_suffix(".svg"), path.with_suffix(".png")
        made.savefig(svg, transparent=True, metadata={"Date": None})
        made.savefig(png, transparent=True, dpi=_PNG_DPI, metadata={"Software": None})
    return [svg, png]
