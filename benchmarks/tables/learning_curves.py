"""The picture of what `learning` has recorded: validation loss by step, for each vocabulary. Needs matplotlib to draw.

Lines are means over the seeds, bands reach from the lowest to the highest seed. Exact gradients are the thick line. Below, each
way's difference from exact gradients, of each seed from its own; there the band about 0 is the spread of exact gradients, and
the scale is linear within what that spread is at the end, logarithmic beyond.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.tables.images import TEXT, save
from benchmarks.tables.learning import EXACT, vocabularies, ways_of

_GREY = "#8b949e"
_PALETTES = {  # by filter; visible on white and on black
    EXACT: (_GREY,),
    "drop": ("#e5484d", "#f2923c", "#d6a700", "#c77dbb"),
    "unbiased": ("#2f81f7", "#12a594", "#46a758", "#8e6fe0", "#5fb8e8", "#94ba2c"),
    "paper": ("#a1583a",),
}
_WIDTH, _HEIGHT = 5.6, 6.4  # inches, the width of each panel
_LINEAR = 0.02  # nats: the lower axes are linear within this, or within a larger spread of exact gradients


def draw(results: dict[str, Any], path: Path) -> list[Path]:
    """Writes `path` with the suffixes .svg and .png, for light and dark backgrounds; returns both paths."""
    return save(lambda: _figure(results), path)


def curves(runs: Iterable[dict[str, Any]]) -> dict[int, np.ndarray]:
    """Validation losses by seed, (points, 2): steps taken and loss."""
    return {run["seed"]: np.array(run["validation"], np.float64) for run in runs}


def colours(results: dict[str, Any]) -> dict[str, str]:
    """By way, the same for every vocabulary."""
    found: dict[str, str] = {}
    left = {kind: itertools.cycle(palette) for kind, palette in _PALETTES.items()}
    for way in itertools.chain.from_iterable(ways_of(results, vocabulary) for vocabulary in vocabularies(results)):
        if way not in found:
            found[way] = next(left[way.partition(":")[0]])
    return found


def _figure(results: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure

    shown, colour_of = vocabularies(results), colours(results)
    figure = Figure(figsize=(_WIDTH * len(shown), _HEIGHT), layout="constrained")
    panels = figure.subplots(2, len(shown), squeeze=False, sharex=True, gridspec_kw={"height_ratios": (3, 2)})
    for (above, below), vocabulary in zip(panels.T, shown, strict=True):
        _fill(above, below, ways_of(results, vocabulary), colour_of)
        above.set_title(f"V = {vocabulary:,}", fontsize=11, color=TEXT)
        below.set_xlabel("step")
    panels[0, 0].set_ylabel("validation loss")
    panels[1, 0].set_ylabel("difference from exact")
    for axes in panels.flat:
        axes.grid(alpha=0.25)
        axes.patch.set_alpha(0)
    return figure


def _fill(above: Any, below: Any, by_way: dict[str, list[dict[str, Any]]], colour_of: dict[str, str]) -> None:
    """Draws the curves of a vocabulary."""
    exact = curves(by_way.get(EXACT, []))
    spread = _band(below, exact)
    for way, runs in by_way.items():
        style = {"color": colour_of[way], "linewidth": 3.5 if way == EXACT else 1.5, "label": way}
        found = curves(runs)
        _line(above, found, style)
        own = {seed: np.c_[curve[:, 0], curve[:, 1] - exact[seed][:, 1]] for seed, curve in found.items() if seed in exact}
        if way != EXACT and own:
            _line(below, own, style)
    above.legend(fontsize=8, frameon=False, labelcolor=TEXT)
    below.axhline(0, color=_GREY, linewidth=1)
    below.set_yscale("symlog", linthresh=max(_LINEAR, spread))
    below.yaxis.set_major_formatter("{x:g}")


def _line(axes: Any, found: dict[int, np.ndarray], style: dict[str, Any]) -> None:
    """The mean over seeds, and the band from the lowest to the highest."""
    every = np.stack(list(found.values()))
    steps, losses = every[0, :, 0], every[:, :, 1]
    axes.plot(steps, losses.mean(axis=0), **style)
    if len(losses) > 1:
        axes.fill_between(steps, losses.min(axis=0), losses.max(axis=0), color=style["color"], alpha=0.15, linewidth=0)


def _band(axes: Any, exact: dict[int, np.ndarray]) -> float:
    """Fills what is within the spread of exact gradients, step by step; returns the last spread, 0 for fewer than two seeds."""
    if len(exact) < 2:
        return 0.0
    every = np.stack(list(exact.values()))
    spread = np.ptp(every[:, :, 1], axis=0)
    axes.fill_between(every[0, :, 0], -spread, spread, color=_GREY, alpha=0.2, linewidth=0)
    return float(spread[-1])
