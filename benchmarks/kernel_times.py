"""Which kernels a call runs, and how long each takes: through PyTorch's profiler, which records those of others, too."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

import cublas
import timing


def of(call: timing.Call) -> list[dict[str, Any]] | str:
    """`name`, `calls` and `us` of each kernel, the slowest first; or why there is nothing to tell."""
    if cublas.torch_with_cuda() is None:
        return "no PyTorch with CUDA, whose profiler would tell"
    try:
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        timing.wait()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            call()
            timing.wait()
        on_device = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
    except Exception as error:  # whatever stands in its way, there is nothing to tell
        return f"PyTorch's profiler: {type(error).__name__}: {error}"
    if not on_device:
        return "PyTorch's profiler saw no kernel; it may lack the right to"
    return summed((readable(event.name), event.time_range.elapsed_us()) for event in on_device)


def summed(runs: Any) -> list[dict[str, Any]]:
    """By name, out of pairs of a name and microseconds."""
    by_name = defaultdict(list)
    for name, us in runs:
        by_name[name].append(us)
    kernels = ({"name": name, "calls": len(us), "us": round(sum(us), 1)} for name, us in by_name.items())
    return sorted(kernels, key=lambda kernel: -kernel["us"])


def readable(name: str) -> str:
    """The Python name of a kernel that numba has mangled; another name as it is.

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
