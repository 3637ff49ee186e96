"""The CPU backend against plain NumPy that stores the logits: loss and gradients in float32, with the same BLAS and threads.

python -m benchmarks cpu --data FILE.npz --record cpu_2_cores     real data
python -m benchmarks cpu                                          the demo's made-up problem
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import cce_numba as cce
from benchmarks import options
from benchmarks.data import Inputs
from benchmarks.errors import Wrong
from benchmarks.measure import record
from benchmarks.tables.cells import add_columns
from cce_numba.commands import UsageError, problems

SHAPE = (2048, 49_152, 576)  # of the made-up problem; real data take N of it
PLAIN = "plain NumPy, logits stored"
# What is measured: options, and how far gradients may be off. The thresholds are bfloat16's, in which models are trained;
# float32's own, 2^-28 and 2^-32, leave out little.
WAYS: dict[str, tuple[dict[str, Any], float]] = {
    "cpu backend, filter_eps=2**-12": ({"filter_eps": 2.0**-12}, 1e-2),
    'cpu backend, filter="drop", filter_eps=2**-16': ({"filter": "drop", "filter_eps": 2.0**-16}, 1e-2),
    "cpu backend, exact": ({"filter_eps": None}, 1e-5),
}
_LOSS_ERROR = 1e-5  # relative to 1 + loss


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The program's options."""
    parser.add_argument("--tokens", type=options.positive, default=SHAPE[0], metavar="N", help=f"default {SHAPE[0]}")
    options.add_data(parser)
    options.add_pace(parser, rounds=7, bursts=False)
    options.add_record(parser)


def run(arguments: argparse.Namespace) -> None:
    """Validates, measures, shows, records."""
    inputs, source = made(arguments)
    methods: dict[str, Callable[[], Any]] = {
        PLAIN: lambda: plain_numpy(*inputs),
        **{way: partial(cce.linear_cross_entropy_with_grad, *inputs, **given) for way, (given, _) in WAYS.items()},
        "cpu backend, loss only": lambda: cce.linear_cross_entropy(*inputs),
    }
    loss = validated(inputs)
    results = {name: record.summary(ms) for name, ms in timed(methods, arguments.rounds).items()}
    problem = dict(zip("NVD", inputs.shape, strict=True)) | {"data": source}
    Console(width=100).print(result_table(problem, results, loss))
    if arguments.record:
        print(record.write(arguments.record, {"problem": problem, "results": results}))


def made(arguments: argparse.Namespace) -> tuple[Inputs, str]:
    """Inputs in float32, and where they come from."""
    archive = options.archive_of(arguments)
    if archive is None:
        problem = problems.synthetic(arguments.tokens, *SHAPE[1:])
        return Inputs(problem.e, problem.c, problem.targets), problem.source
    if arguments.tokens > len(archive.e):
        raise UsageError(f"--tokens: {archive.name} has {len(archive.e)} tokens, got {arguments.tokens}")
    e, targets = archive.e[: arguments.tokens], archive.targets[: arguments.tokens].astype(np.int64)
    return Inputs(e, archive.c, targets), archive.name


def plain_numpy(e: np.ndarray, c: np.ndarray, targets: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Mean loss and gradients from stored logits: three products, and as few passes over the logits as NumPy allows."""
    rows = np.arange(len(e))
    z = e @ c.T
    z -= z.max(axis=1, keepdims=True)
    target_logit = z[rows, targets]
    np.exp(z, out=z)
    total = z.sum(axis=1, keepdims=True)
    loss = np.mean(np.log(total[:, 0]) - target_logit)
    z /= total
    z[rows, targets] -= 1
    z /= len(e)
    return float(loss), z @ c, z.T @ e


def validated(inputs: Inputs) -> float:
    """The mean loss. Raises Wrong if the CPU backend's loss or gradients are off."""
    loss, d_e, d_c = plain_numpy(*inputs)
    for way, (given, allowed) in WAYS.items():
        our_loss, grads = cce.linear_cross_entropy_with_grad(*inputs, **given)
        if not abs(our_loss - loss) <= _LOSS_ERROR * (1 + abs(loss)):
            raise Wrong(f"{way}: the loss is {our_loss}, not {loss}")
        for name, ours, exact in (("dE", grads.e, d_e), ("dC", grads.c, d_c)):
            error = float(np.linalg.norm(ours - exact) / np.linalg.norm(exact))
            if not error <= allowed:
                raise Wrong(f"{way}: the error of {name} is {error:.3g}, allowed is {allowed:.3g}")
    return loss


def timed(methods: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each round, in which all take turns, so that what else the machine does hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(rounds):
        for name, method in methods.items():
            start = time.perf_counter()
            method()
            times[name].append((time.perf_counter() - start) * 1e3)
    return times


def result_table(problem: dict[str, Any], results: dict[str, dict[str, float]], loss: float) -> Table:
    """A row for each method."""
    N, V, D = (problem[name] for name in "NVD")
    table = Table(title=f"loss + gradients, N={N}, V={V}, D={D}, float32, mean loss {loss:.4f}")
    add_columns(table, ("method", "median ms", "min", "max", "times plain"), left=["method"])
    plain = results[PLAIN]["median_ms"]
    for name, r in results.items():
        table.add_row(name, *(f"{r[k]:.0f}" for k in ("median_ms", "min_ms", "max_ms")), f"{r['median_ms'] / plain:.2f}")
    return table
