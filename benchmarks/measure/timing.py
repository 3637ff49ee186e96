"""How times are taken: by events around queued calls that take turns, so that each round gives ratios at one clock."""

from __future__ import annotations

import time
from collections.abc import Collection, Hashable, Mapping
from typing import Any, TypeVar

import numpy as np

from benchmarks.measure import device
from benchmarks.measure.device import Call

Name = TypeVar("Name", bound=Hashable)


def warm_up(calls: Collection[Call], seconds: float) -> None:
    """Keeps the device busy until its clock and power have come to where they stay."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for call in calls:
            call()
        device.wait()


def interleaved(calls: Mapping[Name, Call], rounds: int, burst: int) -> dict[Name, list[float]]:
    """Milliseconds of one call, for each name and round. A round queues each call `burst` times, one call after the other.

    Nothing waits between calls and rounds. The host runs ahead of the device, and its own time does not show unless it is
    longer than the device's. Each call runs once before the first round, so that the device is busy when the first event is
    queued.
    """
    for call in calls.values():
        call()
    marks = []
    for _ in range(rounds):
        row = [device.mark()]
        for call in calls.values():
            for _ in range(burst):
                call()
            row.append(device.mark())
        marks.append(row)
    device.wait()
    return {name: [device.elapsed_ms(row[i], row[i + 1]) / burst for row in marks] for i, name in enumerate(calls)}


def host_ms(call: Call, runs: int = 20) -> list[float]:
    """Milliseconds until a call returns, with nothing queued before it."""
    times = []
    for _ in range(runs):
        device.wait()
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    device.wait()
    return times


def ratios(times: list[float], floor: list[float]) -> dict[str, float]:
    """Median and spread of the rounds' ratios: within a round the clock was the same for both times."""
    return spread(np.divide(times, floor), digits=4)


def spread(values: Any, digits: int) -> dict[str, float]:
    """Median, 10th and 90th percentile."""
    names, numbers = ("median", "p10", "p90"), np.percentile(values, (50, 10, 90))
    return {name: round(float(x), digits) for name, x in zip(names, numbers, strict=True)}
