"""What the cycle counters of the forward's kernel say, as `record_on_gpu.py` keeps them in recorded/timeline.json."""

from __future__ import annotations

from typing import Any

import numpy as np

from .drawings import Spans


def consumers(recorded: dict[str, Any], first: float, last: float) -> list[tuple[str, Spans]]:
    """For a Gantt chart of the cycles [first, last): when each consumer multiplied, folded and waited for its turn."""
    k_steps = -(-recorded["problem"]["D"] // recorded["tiles"]["block_d"])
    return [(f"consumer {'AB'[i]}", _inside(_spans(recorded, i, k_steps), first, last)) for i in range(2)]


def _spans(recorded: dict[str, Any], consumer: int, k_steps: int) -> list[tuple[float, float, str, str]]:
    """Of one consumer. A tile's k_steps uses of the ring follow each other, and no others come between."""
    uses, cycles = (np.array(column) for column in zip(*recorded["uses"][f"released_{consumer}"], strict=True))
    asks = np.array(recorded["turns"][f"asks_{consumer}"])
    spans: list[tuple[float, float, str, str]] = []
    folded = None
    for tile in np.unique(uses // k_steps):
        own = cycles[uses // k_steps == tile]
        if len(own) < k_steps:
            continue  # the recording ends within it
        begin, done = own[0] - np.median(np.diff(own)), own[-1]  # a stage is released when its products are done
        if folded is not None and begin > folded:
            spans.append((folded, begin, "line", "waits"))
        spans.append((begin, done, "z", f"tile {tile}"))
        later = asks[asks > done]
        if len(later):
            folded = later[0]
            spans.append((done, folded, "row", "fold"))
    return spans


def medians(recorded: dict[str, Any]) -> dict[str, float]:
    """Cycles that a consumer's products of a tile, its fold and its waiting for a turn take, medians over both consumers."""
    k_steps = -(-recorded["problem"]["D"] // recorded["tiles"]["block_d"])
    cycles: dict[str, list[float]] = {"products": [], "fold": [], "waits": []}
    for consumer in range(2):
        for start, stop, _, words in _spans(recorded, consumer, k_steps):
            cycles[words if words in cycles else "products"].append(stop - start)
    return {name: float(np.median(found)) for name, found in cycles.items()}


def _inside(spans: Spans, first: float, last: float) -> Spans:
    return [
        (max(0.0, start - first), min(last, stop) - first, colour, words)
        for start, stop, colour, words in spans
        if stop > first and start < last
    ]


def producer_waits(recorded: dict[str, Any]) -> np.ndarray:
    """Cycles that the producer waited for an empty stage, each time; without the first round of the ring."""
    asked, got = (dict(recorded["uses"][kind]) for kind in ("asks", "gets"))
    return np.array([got[use] - asked[use] for use in sorted(asked) if use in got and use >= recorded["tiles"]["stages"]])


def stage_cycles(recorded: dict[str, Any]) -> np.ndarray:
    """Cycles between one stage's products and the next, within tiles, of both consumers."""
    k_steps = -(-recorded["problem"]["D"] // recorded["tiles"]["block_d"])
    found = []
    for consumer in range(2):
        rows = np.array(recorded["uses"][f"released_{consumer}"])
        same = np.diff(rows[:, 0] // k_steps) == 0
        found.append(np.diff(rows[:, 1])[same])
    return np.concatenate(found)
