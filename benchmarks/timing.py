"""How times are taken: events around queued calls, in turns; the host's own time; ratios to a floor of the same round."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

import cupy
import numpy as np

Call = Callable[[], Any]


def mark() -> Any:
    """An event at the end of what is queued."""
    event = cupy.cuda.Event()
    event.record()
    return event


def elapsed_ms(start: Any, stop: Any) -> float:
    """Milliseconds between two events that have happened."""
    return cupy.cuda.get_elapsed_time(start, stop)


def wait() -> None:
    """Until the device has done all that is queued."""
    cupy.cuda.Device().synchronize()


def warm_up(calls: Collection[Call], seconds: float) -> None:
    """Keeps the device busy, so that clock and power have come to where they stay."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for call in calls:
            call()
        wait()


def interleaved(calls: Mapping[str, Call], rounds: int, burst: int) -> dict[str, list[float]]:
    """Milliseconds a call, for each round. A round queues each call `burst` times, one after the other.

    Nothing waits between calls and rounds: the host runs ahead, and what it takes does not show unless it takes longer than the
    device. Each call runs once before, so that the device is busy when the first event is queued.
    """
    for call in calls.values():
        call()
    marks = []
    for _ in range(rounds):
        row = [mark()]
        for call in calls.values():
            for _ in range(burst):
                call()
            row.append(mark())
        marks.append(row)
    wait()
    return {name: [elapsed_ms(row[i], row[i + 1]) / burst for row in marks] for i, name in enumerate(calls)}


def host_ms(call: Call, runs: int = 20) -> list[float]:
    """Milliseconds until a call returns, with nothing queued before it."""
    times = []
    for _ in range(runs):
        wait()
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    wait()
    return times


def captured(call: Call) -> Call:
    """A replay of the call from a CUDA graph: what the device takes, with next to no host."""
    stream = cupy.cuda.Stream(non_blocking=True)
    wait()
    with stream:
        call()  # so that the pool has memory for this stream, and nothing is left to compile
        stream.synchronize()
        stream.begin_capture()
        try:
            results = call()
        finally:
            graph = stream.end_capture()

    def replay() -> Any:
        graph.launch()
        return stream, results  # which must live as long as the graph writes to them

    return replay


def ratios(times: list[float], floor: list[float]) -> dict[str, float]:
    """Those of each round, in which the clock was the same for both: median and spread."""
    return spread(np.divide(times, floor), digits=4)


def spread(values: Any, digits: int) -> dict[str, float]:
    """Median, 10th and 90th percentile."""
    names, numbers = ("median", "p10", "p90"), np.percentile(values, (50, 10, 90))
    return {name: round(float(x), digits) for name, x in zip(names, numbers, strict=True)}
