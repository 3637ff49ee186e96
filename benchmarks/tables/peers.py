"""The README's picture: time and memory of ours against other ways to the same loss and gradients. Needs matplotlib to draw."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.tables.images import TEXT, save

_SHOWN = {  # (name, setting) in the record: name in the picture
    ("cce_numba", "default"): "cce_numba",
    ("cce_numba", "exact"): "cce_numba, exact",
    ("torch.compile", "matmul + cross_entropy"): "torch.compile",
    ("PyTorch eager", "logits stored"): "PyTorch, logits stored",
    ("cut_cross_entropy", "default"): "cut_cross_entropy",
    ("Liger fused linear cross-entropy", "default"): "Liger",
}
_OURS, _OURS_EXACT, _OTHERS = "#2f81f7", "#7db4fb", "#9aa3ad"  # visible on white and on black
_SIZE = 9.6, 3.4  # inches


@dataclass(frozen=True)
class Bar:
    """A method: its name, milliseconds of loss and gradients, GiB beyond the inputs, its colour."""

    name: str
    ms: float
    gib: float
    colour: str


def bars(results: dict[str, Any]) -> list[Bar]:
    """What is shown of the record `peers_h100`, the fastest first."""
    found = []
    for method in results["methods"]:
        name = _SHOWN.get((method["name"], method["setting"]))
        if name is not None:
            ours = method["name"] == "cce_numba"
            colour = (_OURS if method["setting"] == "default" else _OURS_EXACT) if ours else _OTHERS
            found.append(Bar(name, method["forward_backward_ms"], method["extra_mib"] / 1024, colour))
    return sorted(found, key=lambda bar: bar.ms)


def draw(results: dict[str, Any], path: Path) -> list[Path]:
    """Writes `path` with the suffixes .svg and .png, for light and dark backgrounds; returns both paths."""
    return save(lambda: _figure(results), path)


def _figure(results: dict[str, Any]) -> Any:
    """Two panels of bars beside each other, with the methods' names at their left."""
    from matplotlib.figure import Figure

    shown, problem = bars(results), results["problem"]
    figure = Figure(figsize=_SIZE)
    figure.text(0.5, 0.925, "Cross-entropy loss and its gradients: less is better", ha="center", fontsize=13, weight="bold")
    sizes = f"{problem['N']:,} tokens of real text, {problem['V']:,} vocabulary entries, hidden size {problem['D']}"
    figure.text(0.5, 0.85, f"{sizes}, bfloat16, {results['surroundings']['gpu']}", ha="center", fontsize=10)
    gradients = results["gradients_mib"] / 1024
    panels = (
        ("time", [bar.ms for bar in shown], "{:.0f} ms"),
        (f"memory, of which {gradients:.1f} GiB are the gradients", [bar.gib for bar in shown], "{:.1f} GiB"),
    )
    for i, (what, values, form) in enumerate(panels):
        axes = figure.add_axes((0.205 + 0.405 * i, 0.02, 0.335, 0.71))
        rows = range(len(shown))
        axes.barh(rows, values, height=0.68, color=[bar.colour for bar in shown])
        axes.set_title(what, loc="left", fontsize=11, color=TEXT, pad=3)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.17 * max(values))
        axes.set_axis_off()
        for row, (bar, value) in enumerate(zip(shown, values, strict=True)):
            ours = bar.name.startswith("cce_numba")
            style: dict[str, Any] = {"va": "center", "fontsize": 11, "color": _OURS if ours else TEXT}
            style["weight"] = "bold" if ours else "normal"
            axes.text(value + 0.015 * max(values), row, form.format(value), ha="left", **style)
            if i == 0:
                axes.text(-0.02 * max(values), row, bar.name, ha="right", **style)
    return figure
