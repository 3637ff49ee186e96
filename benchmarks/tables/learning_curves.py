"""The picture of what `learning` has recorded: validation loss by step, for each vocabulary. Needs matplotlib to draw.

Lines are means over the seeds, bands reach from the lowest to the highest seed. Exact gradients are the thick line. Below, each
way's difference from exact gradients, of each seed from its own; there the band about 0 is the spread of exact gradients.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.tables.images import TEXT, save
from benchmarks.tables.learning import EXACT, vocabularies, ways_of

_COLOURS = {  # by filter, from the highest threshold on; visible on white and on black
    EXACT: ("#8b949e",),
    "drop": ("#e5484d", "#f2923c", "#d6a700", "#c77dbb"),
    "unbiased": ("#2f81f7", "#12a594", "#46a758", "#8e6fe0", "#5fb8e8", "#94ba2c"),
    "paper": ("#a1583a",),
}
_WIDTH, _HEIGHT = 5.6, 6.4  # inches, the width of each panel
_HIGHEST_APART, _LEAST_APART = 4.0, 0.02  # the lower axes reach so many spreads of exact gradients, and at least so many nats


def draw(results: dict[str, Any], path: Path) -> list[Path]:
    """Writes `path` with the suffixes .svg and .png, for light and dark backgrounds; returns both paths."""
    return save(lambda: _figure(results), path)


def curves(runs: Iterable[dict[str, Any]]) -> dict[int, np.ndarray]:
    """Validation losses by seed, (points, 2): steps taken and loss."""
    return {run["seed"]: np.array(run["validation"], np.float64) for run in runs}


def _figure(results: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure

    shown = vocabularies(results)
    figure = Figure(figsize=(_WIDTH * len(shown), _HEIGHT), layout="constrained")
    panels = figure.subplots(2, len(shown), squeeze=False, sharex=True, gridspec_kw={"height_ratios": (3, 2)})
    for (above, below), vocabulary in zip(panels.T, shown, strict=True):
        _fill(above, below, ways_of(results, vocabulary))
        above.set_title(f"V = {vocabulary:,}", fontsize=11, color=TEXT)
        below.set_xlabel("step")
    panels[0, 0].set_ylabel("validation loss")
    panels[1, 0].set_ylabel("less that of exact gradients")
    for axes in panels.flat:
        axes.grid(alpha=0.25)
        axes.patch.set_alpha(0)
    return figure


def _fill(above: Any, below: Any, by_way: dict[str, list[dict[str, Any]]]) -> None:
    """Draws the curves of a vocabulary."""
    exact = curves(by_way.get(EXACT, []))
    spread = _band(below, exact)
    used = dict.fromkeys(_COLOURS, 0)
    apart: list[float] = []
    for way, runs in by_way.items():
        kind = way.partition(":")[0]
        palette = _COLOURS[kind]
        style = {"color": palette[used[kind] % len(palette)], "linewidth": 3.5 if way == EXACT else 1.5, "label": way}
        used[kind] += 1
        found = curves(runs)
        _line(above, found, style)
        own = {seed: np.c_[curve[:, 0], curve[:, 1] - exact[seed][:, 1]] for seed, curve in found.items() if seed in exact}
        if way != EXACT and own:
            _line(below, own, style)
            apart += [abs(float(curve[-1, 1])) for curve in own.values()]
    above.legend(fontsize=8, frameon=False, labelcolor=TEXT)
    below.axhline(0, color=_COLOURS[EXACT][0], linewidth=1)
    finite = [value for value in apart if np.isfinite(value)]
    if finite:
        most = max(_LEAST_APART, min(1.2 * max(finite), _HIGHEST_APART * spread if spread else np.inf))
        below.set_ylim(-most, most)


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
    axes.fill_between(every[0, :, 0], -spread, spread, color=_COLOURS[EXACT][0], alpha=0.2, linewidth=0)
    return float(spread[-1])
