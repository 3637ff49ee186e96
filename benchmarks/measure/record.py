"""Where and with what a measurement was taken, and its results as JSON."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent.parent / "results"
_PACKAGES = (
    *("numpy", "numba", "numba-cuda", "ml_dtypes", "cupy-cuda12x", "cupy-cuda13x", "torch", "jax", "jaxlib"),
    *("cuda-core", "cuda-toolkit", "nvidia-cublas", "nvidia-cublas-cu12"),
    *("cut-cross-entropy", "liger-kernel", "quack-kernels", "nvidia-cutlass-dsl", "triton", "transformers"),
)


def surroundings() -> dict[str, Any]:
    """Machine, versions, commit and date."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "cpu": next((x.split(":")[1].strip() for x in open("/proc/cpuinfo") if x.startswith("model name")), ""),
        "gpu": gpu(),
        "gpu_power_limit_and_highest_clock": _output(
            "nvidia-smi", "--query-gpu=power.limit,clocks.max.sm", "--format=csv,noheader"
        ),
        "versions": {name: version for name in _PACKAGES if (version := _version(name))},
    }


def commit() -> str:
    """The commit of the checkout. Where the files came without their history, CCE_COMMIT tells it."""
    return os.environ.get("CCE_COMMIT") or _output("git", "describe", "--always", "--dirty")


def gpu() -> str:
    """Name and driver version of each GPU."""
    return _output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")


def summary(times: list[float]) -> dict[str, float]:
    """Median and spread of repeated times, in ms."""
    return {
        "median_ms": round(statistics.median(times), 3),
        "min_ms": round(min(times), 3),
        "max_ms": round(max(times), 3),
        "runs": len(times),
    }


def path(name: str) -> Path:
    """Where results of this name are."""
    return RESULTS / f"{name}.json"


def read(name: str) -> dict[str, Any]:
    """Recorded results."""
    return json.loads(path(name).read_text())


def write(name: str, results: dict[str, Any]) -> Path:
    """Writes results, with the surroundings, to results/<name>.json."""
    RESULTS.mkdir(exist_ok=True)
    path(name).write_text(json.dumps({"surroundings": surroundings(), **results}, indent=1) + "\n")
    return path(name)


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
