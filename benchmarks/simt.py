"""The portable kernels against cuBLAS's fp32 product `e @ c.T` of the same sizes (no tf32), on one GPU.

Times are of calls queued back to back, as in training: device time, with the host running ahead; the host's own time for a
call stands beside it.
"""

from __future__ import annotations

import argparse
from typing import Any

import cupy
import numpy as np
import record
import timing
from rich.console import Console
from rich.table import Table

import cce_numba as cce


def validate(e: Any, c: Any, targets: Any) -> None:
    """The loss and exact gradients against stored logits in float64, before anything is timed."""
    rows = slice(0, 256)
    z = e[rows].astype(np.float64) @ c.T.astype(np.float64)
    p = cupy.exp(z - z.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    nll = -cupy.log(p[cupy.arange(256), targets[rows]])
    loss, grads = cce.linear_cross_entropy_with_grad(e[rows], c, targets[rows], reduction="none", filter_eps=None)
    assert float(cupy.abs(loss - nll).max()) <= 1e-5 * (1 + float(cupy.abs(z).max()))
    p[cupy.arange(256), targets[rows]] -= 1
    for ours, exact in ((grads.e, p @ c), (grads.c, p.T @ e[rows])):
        assert float(cupy.linalg.norm(ours - exact)) <= 1e-5 * float(cupy.linalg.norm(exact))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", metavar="NAME", help="write results/NAME.json")
    arguments = parser.parse_args()
    N, V, D = 2048, 32768, 1024
    rng = cupy.random.default_rng(0)
    e, c = rng.standard_normal((N, D), dtype=np.float32), rng.standard_normal((V, D), dtype=np.float32) / 16
    targets = rng.integers(0, V, N)
    validate(e, c, targets)
    filtered, exact = (cce.forward(e, c, targets, filter_eps=eps) for eps in (2.0**-16, None))
    calls = {
        "cuBLAS e @ c.T, fp32": lambda: e @ c.T,
        "linear_logsumexp": lambda: cce.linear_logsumexp(e, c),
        "forward (indexed dot, lse, survivor bits)": lambda: cce.forward(e, c, targets),
        "backward, filter_eps=2**-16": lambda: cce.backward(filtered),
        "backward, exact": lambda: cce.backward(exact),
    }
    flops = 2 * N * V * D
    times = timing.interleaved(calls, rounds=7, burst=5)
    results = {
        name: record.summary(times[name]) | {"host_ms": record.summary(timing.host_ms(call))["median_ms"]}
        for name, call in calls.items()
    }
    floor = results["cuBLAS e @ c.T, fp32"]["median_ms"]
    table = Table(title=f"N={N}, V={V}, D={D}, float32, random data ({filtered.survivor_counts().mean() / V:.0%} survive)")
    for column in ("call", "median ms", "min", "max", "TFLOP/s of one product", "share of cuBLAS's rate", "host ms"):
        table.add_column(column, justify="left" if column == "call" else "right")
    for name, r in results.items():
        cells = (f"{r[k]:.2f}" for k in ("median_ms", "min_ms", "max_ms"))
        rate = flops / r["median_ms"] / 1e9
        table.add_row(name, *cells, f"{rate:.1f}", f"{floor / r['median_ms']:.2f}", f"{r['host_ms']:.2f}")
    Console(width=120).print(table)
    if arguments.record:
        print(record.write(arguments.record, {"problem": {"N": N, "V": V, "D": D, "data": "random"}, "results": results}))


if __name__ == "__main__":
    main()
