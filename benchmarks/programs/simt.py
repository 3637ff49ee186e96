"""The portable kernels against cuBLAS's float32 product `e @ c.T` of the same sizes (no tf32), on one GPU.

    python -m benchmarks simt --record simt_h100

Times are of calls queued back to back, as in training: they are the device's, with the host running ahead. The host's own
time for a call stands beside them.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import cce_numba as cce
from benchmarks import options
from benchmarks.data import Inputs, Shape
from benchmarks.errors import Wrong
from benchmarks.measure import device, record, timing
from benchmarks.tables.cells import add_columns

SHAPE: Shape = (2048, 32_768, 1024)
CUBLAS = "cuBLAS e @ c.T, fp32"
_TOKENS = 256  # that are validated
_ERROR = 1e-5  # at most: of a loss relative to 1 + the largest logit, of a gradient relative to its norm


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The program's options."""
    parser.add_argument("--rounds", type=options.positive, default=7, help="default 7")
    parser.add_argument("--burst", type=options.positive, default=5, help="how often a round queues each call (default 5)")
    options.add_record(parser)


def run(arguments: argparse.Namespace) -> None:
    """Validates, measures, shows, records."""
    device.require()
    inputs = made()
    e, c, targets = inputs
    validate(inputs)
    filtered, exact = (cce.forward(e, c, targets, filter="drop", filter_eps=eps) for eps in (2.0**-16, None))
    calls = {
        CUBLAS: lambda: e @ c.T,
        "linear_logsumexp": lambda: cce.linear_logsumexp(e, c),
        "forward (indexed dot, lse, survivor bits)": lambda: cce.forward(e, c, targets),
        "backward, filter_eps=2**-16": lambda: cce.backward(filtered),
        "backward, exact": lambda: cce.backward(exact),
    }
    times = timing.interleaved(calls, arguments.rounds, arguments.burst)
    results = {
        name: record.summary(times[name]) | {"host_ms": record.summary(timing.host_ms(call))["median_ms"]}
        for name, call in calls.items()
    }
    problem = dict(zip("NVD", inputs.shape, strict=True)) | {"data": "random"}
    survive = float(filtered.survivor_counts().mean()) / len(c)
    Console(width=120).print(result_table(problem, results, survive))
    if arguments.record:
        print(record.write(arguments.record, {"problem": problem, "results": results}))


def made() -> Inputs:
    """Random inputs in float32."""
    N, V, D = SHAPE
    rng = device.cupy().random.default_rng(0)
    e, c = rng.standard_normal((N, D), dtype=np.float32), rng.standard_normal((V, D), dtype=np.float32) / 16
    return Inputs(e, c, rng.integers(0, V, N))


def validate(inputs: Inputs) -> None:
    """Compares loss and exact gradients of some tokens with stored logits in float64. Raises Wrong if they are off."""
    xp = device.cupy()
    e, c, targets = inputs.e[:_TOKENS], inputs.c, inputs.targets[:_TOKENS]
    rows = xp.arange(len(e))
    z = e.astype(np.float64) @ c.T.astype(np.float64)
    p = xp.exp(z - z.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    nll = -xp.log(p[rows, targets])
    loss, grads = cce.linear_cross_entropy_with_grad(e, c, targets, reduction="none", filter_eps=None)
    off = float(xp.abs(loss - nll).max()) / (1 + float(xp.abs(z).max()))
    if not off <= _ERROR:
        raise Wrong(f"the loss is off by {off:.3g}, allowed is {_ERROR}")
    p[rows, targets] -= 1
    for name, ours, exact in (("dE", grads.e, p @ c), ("dC", grads.c, p.T @ e)):
        error = float(xp.linalg.norm(ours - exact) / xp.linalg.norm(exact))
        if not error <= _ERROR:
            raise Wrong(f"the error of {name} is {error:.3g}, allowed is {_ERROR}")


def result_table(problem: dict[str, Any], results: dict[str, dict[str, float]], survive: float) -> Table:
    """A row for each call."""
    N, V, D = (problem[name] for name in "NVD")
    table = Table(title=f"N={N}, V={V}, D={D}, float32, random data ({survive:.0%} survive)")
    columns = "call", "median ms", "min", "max", "TFLOP/s of one product", "share of cuBLAS's rate", "host ms"
    add_columns(table, columns, left=["call"])
    floor = results[CUBLAS]["median_ms"]
    for name, r in results.items():
        cells = (f"{r[k]:.2f}" for k in ("median_ms", "min_ms", "max_ms"))
        rate = 2 * N * V * D / r["median_ms"] / 1e9
        table.add_row(name, *cells, f"{rate:.1f}", f"{floor / r['median_ms']:.2f}", f"{r['host_ms']:.2f}")
    return table
