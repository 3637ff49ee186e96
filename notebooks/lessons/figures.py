"""Matplotlib in the lessons' visual language: figures leave as SVG on their own paper, light and dark.

>>> figure, axes = new(5, 3)
>>> _ = axes.plot([1, 2], colour="e")  # doctest: +SKIP
"""

from __future__ import annotations

import io
import re
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt

from .style import COLOURS, light

plt.rcParams.update(
    {
        "figure.facecolor": light("paper"),
        "axes.facecolor": light("paper"),
        "savefig.facecolor": light("paper"),
        "axes.edgecolor": light("quiet"),
        "axes.labelcolor": light("ink"),
        "text.color": light("ink"),
        "xtick.color": light("quiet"),
        "ytick.color": light("quiet"),
        "grid.color": light("line"),
        "grid.linewidth": 0.6,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.labelsize": 9,
        "font.size": 9,
        "legend.frameon": False,
        "legend.fontsize": 8.5,
        "svg.fonttype": "none",
        "svg.hashsalt": "lessons",
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "lines.linewidth": 1.8,
        "axes.prop_cycle": matplotlib.cycler(color=[light(name) for name in ("e", "c", "z", "survivor", "g", "row")]),
    }
)


def new(width: float = 7.0, height: float = 3.2, columns: int = 1, **options: Any) -> tuple[Any, Any]:
    """A figure of a size in inches, and its axes: one, or an array of `columns`."""
    return plt.subplots(1, columns, figsize=(width, height), layout="constrained", **options)


class Figure:
    """A finished figure; Jupyter shows its SVG."""

    def __init__(self, figure: Any, title: str) -> None:
        with io.StringIO() as file:
            figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Title": title}, dpi=110)
            text = file.getvalue()
        plt.close(figure)
        self.title, self._svg = title, _themed(text[text.index("<svg") :])

    def svg(self) -> str:
        """The file's text."""
        return self._svg

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        return {"image/svg+xml": self._svg, "text/plain": self.title}


def show(figure: Any, title: str) -> Figure:
    """The figure as Jupyter shows it: the last line of a cell. `title` is what stands where no picture can."""
    return Figure(figure, title)


def _themed(text: str) -> str:
    """Adds rules by which a dark theme exchanges the colours, and makes the picture no wider than its place."""
    swaps = []
    for on_light, on_dark in COLOURS.values():
        for what in ("fill", "stroke"):
            swaps.append(f'[style*="{what}: {on_light}"]{{{what}:{on_dark}!important}}')
    # Letters without a colour are black.
    swaps.append(f"text:not([style*='fill:']){{fill:{COLOURS['ink'][1]}}}")
    rules = f"<style>@media (prefers-color-scheme:dark){{{''.join(swaps)}}}</style>"
    text = re.sub(r"<svg ", '<svg style="max-width:100%;height:auto" ', text, count=1)
    head = text.index(">") + 1
    return text[:head] + rules + text[head:]
