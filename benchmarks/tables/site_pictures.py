"""Pictures of the site, out of recorded results: bars with their numbers beside them. They need matplotlib to draw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.tables.forward import BITS, LOSS
from benchmarks.tables.images import TEXT, save

OURS, OTHERS = "#2f81f7", "#9aa3ad"  # visible on white and on black
_ROW_INCHES, _TITLE_INCHES, _WIDTH_INCHES = 0.27, 0.62, 9.6
_NAMES_SHARE = 0.30  # of the width, for the names at the left, at least
_CHARACTER_SHARE = 0.0077  # of the width, for each character of the longest name


@dataclass(frozen=True)
class Bar:
    """A bar.

    Attributes:
        name: what stands at the left.
        value: its length.
        told: the words beside it.
        ours: whether it is drawn as ours.
        spread: from where to where measurements lie, or None.
    """

    name: str
    value: float
    told: str
    ours: bool = True
    spread: tuple[float, float] | None = None


@dataclass(frozen=True)
class Panel:
    """Bars under one title. All panels of a picture have the same names."""

    title: str
    bars: Sequence[Bar]


def forward(results: dict[str, Any]) -> list[Panel]:
    """X of the loss alone, and with what a backward needs, for each problem."""
    panels = []
    for title, call in (("loss alone", LOSS), ("with survivor bits", BITS)):
        bars = []
        for problem in results["problems"]:
            x = problem["calls"][call]["x"]
            name = f"{_shape(problem)}, {problem['data'].split()[0]}"
            bars.append(Bar(name, x["median"], f"{x['median']:.2f} X", spread=(x["p10"], x["p90"])))
        panels.append(Panel(title, bars))
    return panels


def backward(results: dict[str, Any]) -> list[Panel]:
    """X of loss and gradients, for each call that was right."""
    bars = []
    for row in results["rows"]:
        if "wrong" not in row:
            x = row["x"]
            told = f"{x['median']:.2f} X, {row['call']['median_ms']:.1f} ms"
            bars.append(Bar(f"{row['name']}, {row['data']} {row['V']}", x["median"], told, spread=(x["p10"], x["p90"])))
    return [Panel("time of loss and gradients, by that of the one product e @ c.T", bars)]


def errors(results: dict[str, Any]) -> list[Panel]:
    """Errors of both gradients of each method that was compared with float32 mathematics."""
    measured = [method for method in results["methods"] if method["d_e_error"] is not None]
    return [
        Panel(
            f"error of {title}",
            [Bar(_method(m), m[key], f"{m[key]:.1e}", m["name"] == "cce_numba") for m in measured],
        )
        for title, key in (("dE", "d_e_error"), ("dC", "d_c_error"))
    ]


def memory(results: dict[str, Any]) -> list[Panel]:
    """Peak memory beyond the inputs and beyond the gradients of each method."""
    beyond = [(m, m["extra_mib"] - results["gradients_mib"]) for m in results["methods"] if m["extra_mib"] is not None]
    bars = [Bar(_method(m), mib, _bytes(mib * 2**20), m["name"] == "cce_numba") for m, mib in beyond]
    return [Panel("memory beyond the inputs and the two gradients", bars)]


def training_step(results: dict[str, Any]) -> list[Panel]:
    """Time and peak memory of the steps of a small transformer."""
    rows = [(f"{row['way']}, {row['loss']}", row) for row in results["step"]["rows"]]
    ours = {name: row["loss"] == "cce_numba" for name, row in rows}
    time = [Bar(name, row["median_ms"], f"{row['median_ms']:.1f} ms", ours[name]) for name, row in rows]
    peak = [Bar(name, row["peak_bytes"], f"{row['peak_bytes'] / 1e9:.1f} GB", ours[name]) for name, row in rows]
    return [Panel("time of a step", time), Panel("peak memory", peak)]


def cpu(results: dict[str, Any]) -> list[Panel]:
    """Time on the CPU, for each way."""
    bars = []
    for name, row in results["results"].items():
        spread = row["min_ms"], row["max_ms"]
        told = f"{row['median_ms'] / 1000:.2f} s"
        bars.append(Bar(name.removeprefix("cpu backend, "), row["median_ms"], told, name.startswith("cpu backend"), spread))
    return [Panel("loss and gradients on a CPU: cce_numba (blue), and NumPy", bars)]


Made = Callable[[dict[str, Any]], list[Panel]]
# Of each picture: the record, and what it shows of it.
PICTURES: dict[str, tuple[str, Made]] = {
    "forward": ("forward_h100", forward),
    "backward": ("backward_h100", backward),
    "errors": ("peers_h100", errors),
    "memory": ("peers_h100", memory),
    "training_step": ("training_step_h100", training_step),
    "cpu": ("cpu_2_cores", cpu),
}


Draw = Callable[[dict[str, Any], Path], list[Path]]


def drawing(made: Made) -> Draw:
    """A function that draws what `made` makes of a record, as an SVG and a PNG."""
    return lambda results, path: save(lambda: _figure(made(results), _where(results)), path)


def _figure(panels: list[Panel], where: str) -> Any:
    """Panels beside each other, names at the left of the first, the GPU in the last line."""
    from matplotlib.figure import Figure

    rows = len(panels[0].bars)
    height = _TITLE_INCHES + _ROW_INCHES * (rows + 1)
    figure = Figure(figsize=(_WIDTH_INCHES, height))
    names_share = max(_NAMES_SHARE, _CHARACTER_SHARE * max(len(bar.name) for bar in panels[0].bars))
    width = (1 - names_share) / len(panels)
    for i, panel in enumerate(panels):
        assert [bar.name for bar in panel.bars] == [bar.name for bar in panels[0].bars], "panels share their names"
        bottom = 1.2 * _ROW_INCHES / height
        axes = figure.add_axes((names_share + width * i, bottom, width * 0.96, 1 - bottom - _TITLE_INCHES / height * 0.6))
        _draw(axes, panel, with_names=i == 0)
    figure.text(0.995, 0.02, where, ha="right", va="bottom", fontsize=8.5, color=TEXT)
    return figure


def _draw(axes: Any, panel: Panel, with_names: bool) -> None:
    """One panel's bars, whiskers and words."""
    longest = max(max(bar.value, *(bar.spread or (0,))) for bar in panel.bars)
    room = 1.0 + 0.028 * max(len(bar.told) for bar in panel.bars) * (1 if with_names else 1.3)
    rows = range(len(panel.bars))
    axes.barh(rows, [bar.value for bar in panel.bars], height=0.66, color=[OURS if bar.ours else OTHERS for bar in panel.bars])
    axes.set_title(panel.title, loc="left", fontsize=11, color=TEXT, pad=4)
    axes.invert_yaxis()
    axes.set_ylim(len(panel.bars) - 0.4, -0.6)
    axes.set_xlim(0, room * longest)
    axes.set_axis_off()
    for row, bar in enumerate(panel.bars):
        end = bar.value
        if bar.spread is not None:
            end = max(end, bar.spread[1])
            axes.plot(bar.spread, (row, row), color=TEXT, lw=1.4, solid_capstyle="butt")
        axes.text(end + 0.012 * longest, row, bar.told, ha="left", va="center", fontsize=9.5)
        if with_names:
            axes.text(-0.02 * longest, row, bar.name, ha="right", va="center", fontsize=9.5)


def _method(method: dict[str, Any]) -> str:
    name = {"Liger fused linear cross-entropy": "Liger"}.get(method["name"], method["name"])
    return name if method["setting"] in ("default", "matmul + cross_entropy") else f"{name}, {method['setting']}"


def _bytes(size: float) -> str:
    return f"{size / 2**20:.0f} MiB" if size < 2**30 else f"{size / 2**30:.1f} GiB"


def _shape(problem: dict[str, Any]) -> str:
    return f"{problem['N']} x {problem['V']} x {problem['D']}"


def _where(results: dict[str, Any]) -> str:
    where = results["surroundings"]
    machine = where["gpu"].partition(",")[0] or f"{where['cores']} cores, {where['cpu']}"
    return f"{machine}, {where['date']}"
