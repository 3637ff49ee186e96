"""The CPU backend against plain NumPy that stores the logits: loss + gradients, same BLAS, same threads.

python benchmarks/cpu.py DEMO_FILE.npz        a file of `make_demo_file.py`; without one, the demo's made-up problem
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import record
from rich.console import Console
from rich.table import Table

import cce_numba as cce
from cce_numba.commands import problems


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", help="npz with e, c, targets")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--record", metavar="NAME", help="write results/NAME.json")
    arguments = parser.parse_args()
    problem = problems.load(arguments.data, None, "float32") if arguments.data else problems.synthetic(2048, 49152, 576)
    e, c, targets = problem.e.astype(np.float32), problem.c.astype(np.float32), problem.targets

    def ours(filter_eps: float | None) -> Callable[[], Any]:
        return lambda: cce.linear_cross_entropy_with_grad(e, c, targets, filter_eps=filter_eps)

    methods = {
        "plain NumPy, logits stored": lambda: plain_numpy(e, c, targets),
        "cpu backend, filter_eps=2**-16": ours(2.0**-16),
        "cpu backend, exact": ours(None),
        "cpu backend, loss only": lambda: cce.linear_cross_entropy(e, c, targets),
    }
    loss, d_e, d_c = plain_numpy(e, c, targets)
    for filter_eps, tolerance in ((None, 1e-5), (2.0**-16, 1e-2)):  # validated before timed
        our_loss, grads = ours(filter_eps)()
        assert abs(our_loss - loss) <= 1e-5 * (1 + abs(loss))
        for ours_, exact in ((grads.e, d_e), (grads.c, d_c)):
            assert np.linalg.norm(ours_ - exact) <= tolerance * np.linalg.norm(exact)

    times: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(arguments.runs):  # in turns, so that what else the machine does hits all alike
        for name, method in methods.items():
            start = time.perf_counter()
            method()
            times[name].append((time.perf_counter() - start) * 1e3)
    results = {name: record.summary(t) for name, t in times.items()}
    plain = results["plain NumPy, logits stored"]["median_ms"]
    table = Table(title=f"loss + gradients, N={len(e)}, V={len(c)}, D={e.shape[1]}, float32, mean loss {loss:.4f}")
    for column in ("method", "median ms", "min", "max", "times plain"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for name, r in results.items():
        table.add_row(name, *(f"{r[k]:.0f}" for k in ("median_ms", "min_ms", "max_ms")), f"{r['median_ms'] / plain:.2f}")
    Console(width=100).print(table)
    if arguments.record:
        shape = {
            "N": len(e),
            "V": len(c),
            "D": e.shape[1],
            "data": Path(arguments.data).name if arguments.data else problem.source,
        }
        print(record.write(arguments.record, {"problem": shape, "results": results}))


if __name__ == "__main__":
    main()
