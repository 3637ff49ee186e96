"""Which kernels a call runs, and how long each takes, by PyTorch's profiler, which also records kernels of other libraries."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from benchmarks.measure import device
from benchmarks.measure.device import Call


def of(call: Call) -> list[dict[str, Any]] | str:
    """`name`, `calls` and `us` of each kernel, the slowest first; or a sentence on why there is nothing to tell."""
    if device.torch_with_cuda() is None:
        return "no PyTorch with CUDA, whose profiler would tell"
    try:
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        device.wait()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            call()
            device.wait()
        on_device = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
    except Exception as error:  # whatever stands in the profiler's way, the times of the call itself are still good
        return f"PyTorch's profiler: {type(error).__name__}: {error}"
    if not on_device:
        return "PyTorch's profiler saw no kernel; it may lack the right to"
    return summed((readable(event.name), event.time_range.elapsed_us()) for event in on_device)


def summed(runs: Iterable[tuple[str, float]]) -> list[dict[str, Any]]:
    """Sums by name, out of pairs of a name and microseconds."""
    by_name = defaultdict(list)
    for name, us in runs:
        by_name[name].append(us)
    kernels = ({"name": name, "calls": len(us), "us": round(sum(us), 1)} for name, us in by_name.items())
    return sorted(kernels, key=lambda kernel: -kernel["us"])


def readable(name: str) -> str:
    """The Python name of a kernel whose name numba has mangled; any other name as it is.

    >>> readable("_ZN9cce_numba6hopper8backward9dc_kernelB2v1B4cw51E10float32_2ai")
    'cce_numba.hopper.backward.dc_kernel'
    """
    if not name.startswith("_ZN"):
        return name
    parts, rest = [], name[3:]
    while number := re.match(r"\d+", rest):
        stop = number.end() + int(number[0])
        parts.append(rest[number.end() : stop])
        rest = rest[stop:]
    return ".".join(part for part in parts if part != "_3clocals_3e")
