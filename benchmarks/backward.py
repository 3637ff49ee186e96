"""Loss and gradients against cuBLAS's one product `e @ c.T` (bfloat16), in the same run: X is our time over its time.

    python benchmarks/backward.py --real ARCHIVE.npz --record backward_h100       all rows
    python benchmarks/backward.py --rows 1 exact --rounds 5 --profile             some rows, and which kernels take how long
    python benchmarks/backward.py --quick                                         small shapes: does it run?

A row is a call with its options, on one of three data sets: made-up inputs as sparse as a real model's with a vocabulary of
256 000 (`calibrated`), a real last layer as it is, its hidden size lifted (`inputs.real`), and random ones. Data are made once
for all their rows, and so are the gradients that float32 mathematics gives (`exact_gradients`). A row that is far from these,
or raises, is told to be wrong and not timed. Times are taken as in `forward`: in turns with cuBLAS, X within a round.

Extra memory is the peak of what CuPy's pool hands out during a call, less the gradients that it returns. "Flagged" is the share
of the vocabulary that a block of tokens keeps, "zero rows" that of dC's rows that are zero as a whole.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
import traceback
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import backward_tables
import calibrated
import cublas
import cupy
import exact_gradients
import forward
import inputs
import kernel_times
import record
import timing
from rich.console import Console

import cce_numba as cce
from cce_numba.commands import machine

Shape = tuple[int, int, int]  # N, V, D
SHAPES: dict[str, Shape] = {"calibrated": (8192, 256_000, 2304), "random": (8192, 131_072, 4096)}
REAL_D = 2304  # to which an archive's hidden size is lifted; N and V are its own
QUICK_SHAPE: Shape = (300, 5000, 584)  # of real data, N and D alone
HOST_US = 1000  # at most
EXTRA_SHARE = 0.12  # of what both gradients take: the extra memory, at most
FILTERED_ERRORS = {"e": 5e-3, "c": 3e-3}  # at most, of filtered gradients on real data
EXACT_ERRORS = 2  # at most, of exact gradients, in errors of rounding
_WRONG = 0.1  # an error that no rounding and no filter makes
_LOSS_ERROR = 1e-4  # relative to 1 + loss


@dataclass(frozen=True)
class Row:
    """A call to be measured.

    Attributes:
        name: what is special about it.
        data: on which data set.
        options: those of the loss.
        wrt: the gradients that it computes; none is the forward alone.
        x_at_most: what X is to be at most.
    """

    name: str
    data: str
    options: Mapping[str, Any] = field(default_factory=dict)
    wrt: tuple[str, ...] = ("e", "c")
    x_at_most: float | None = None

    def call(self, e: Any, c: Any, targets: Any) -> tuple[Any, Any]:
        """The loss and the gradients, None for the forward alone."""
        if not self.wrt:
            return cce.forward(e, c, targets, **self.options).loss, None
        return cce.linear_cross_entropy_with_grad(e, c, targets, wrt=self.wrt, **self.options)

    def error_at_most(self, gradient: str, rounding: float) -> float | None:
        """Of "e" or "c", given the error of rounding the exact one."""
        if self.options.get("filter_eps", "auto") is None or not self.options.get(f"filter_{gradient}_grad", True):
            return EXACT_ERRORS * rounding
        return FILTERED_ERRORS[gradient] if self.data == "real" else None


ROWS = (
    Row("default filter", "calibrated", x_at_most=1.7),
    Row("default filter", "real", x_at_most=2.6),
    Row("exact", "calibrated", {"filter_eps": None}, x_at_most=4.8),
    Row("exact dC", "calibrated", {"filter_c_grad": False}, x_at_most=3.6),
    Row("frozen classifier", "calibrated", wrt=("e",), x_at_most=1.5),
    Row("frozen body", "calibrated", wrt=("c",)),
    Row("exact", "real", {"filter_eps": None}),
    Row("default filter", "random"),
    Row("forward alone", "calibrated", wrt=()),
    Row("forward alone", "real", wrt=()),
)


@dataclass(frozen=True)
class Data:
    """A data set, what its gradients must be, and cuBLAS's product of it."""

    name: str
    arrays: tuple[Any, Any, Any]
    exact: exact_gradients.Exact
    product: timing.Call

    def described(self) -> dict[str, Any]:
        """Name and shape."""
        e, c, _ = self.arrays
        return {"data": self.name, "N": len(e), "V": len(c), "D": e.shape[1]}


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    if reason := machine.why_no_gpu():
        sys.exit(f"backward: {reason}")
    console = Console(width=180)
    results: dict[str, Any] = {
        "how": {"rounds": arguments.rounds, "burst": arguments.burst, "cublas": cublas.library()},
        "data": [],
        "rows": [],
    }
    try:
        for name in dict.fromkeys(ROWS[i].data for i in arguments.rows):
            measure_rows(name, arguments, results, console)
        with console.status("host"):
            results["host_us"] = forward.host_us((cce.linear_cross_entropy_with_grad,), HOST_US)
    finally:  # what was measured before something broke was measured
        results["rows"].sort(key=lambda row: row["number"])
        if results["rows"]:
            console.print(backward_tables.row_table(results))
        if "host_us" in results:
            console.print(backward_tables.host_table(results["host_us"]))
        if arguments.left_out:
            numbers = ", ".join(str(i + 1) for i in arguments.left_out)
            console.print(f"Without real data (rows {numbers}): no --real ARCHIVE.npz was given.")
        if arguments.record and results["rows"]:
            console.print(str(record.write(arguments.record, results)))
    if wrong := [str(row["number"]) for row in results["rows"] if "wrong" in row]:
        sys.exit(f"backward: wrong, and not timed: rows {', '.join(wrong)}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Arguments, and what follows: `rows` and `left_out` (places in ROWS), `warm_up_s`, `archive`. Exits if they don't fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = "; ".join(f"{i} {row.name}, {row.data}" for i, row in enumerate(ROWS, 1))
    parser.add_argument("--rows", nargs="+", metavar="ROW", help=f"these alone, by number or a part of the name: {known}")
    parser.add_argument("--quick", action="store_true", help="small shapes, without limits for time and memory")
    parser.add_argument("--real", metavar="ARCHIVE.npz", help="real data, from an archive as make_demo_file takes it")
    parser.add_argument("--rounds", type=int, default=20, help="default 20")
    parser.add_argument("--burst", type=int, default=2, help="calls of a kind that a round queues (default 2)")
    parser.add_argument("--profile", action="store_true", help="show the times of each row's kernels, too (needs PyTorch)")
    parser.add_argument("--record", metavar="NAME", help="write results/NAME.json")
    arguments = parser.parse_args(argv)
    arguments.warm_up_s = 0.1 if arguments.quick else 1.0
    arguments.archive = None
    if min(arguments.rounds, arguments.burst) < 1:
        parser.error("numbers must be at least 1")
    wanted = arguments.rows or [""]
    for what in wanted:
        if not any(matches(i, what) for i in range(len(ROWS))):
            parser.error(f"--rows: there is no {what!r} among {known}")
    rows = [i for i in range(len(ROWS)) if any(matches(i, what) for what in wanted)]
    arguments.left_out = [] if arguments.real else [i for i in rows if ROWS[i].data == "real"]
    arguments.rows = [i for i in rows if i not in arguments.left_out]
    if not arguments.rows:
        parser.error("--rows: real data need --real ARCHIVE.npz")
    if arguments.real:
        try:
            arguments.archive = inputs.read(arguments.real)
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            parser.error(f"--real: {arguments.real}: {error}")
        _, V, D = shape_of("real", arguments)
        if reason := arguments.archive.why_not(V, D):
            parser.error(f"--real: cannot be lifted to a hidden size of {D}: {reason}")
    return arguments


def matches(i: int, what: str) -> bool:
    """Whether a number or a part of a name means ROWS[i]."""
    return what == str(i + 1) if what.isdigit() else what in f"{ROWS[i].name}, {ROWS[i].data}"


def shape_of(data: str, arguments: argparse.Namespace) -> Shape:
    """N, V and D of a data set; a real one has no more tokens than there are."""
    if data != "real":
        return QUICK_SHAPE if arguments.quick else SHAPES[data]
    tokens, V = len(arguments.archive.e), len(arguments.archive.c)
    return (min(QUICK_SHAPE[0], tokens), V, QUICK_SHAPE[2]) if arguments.quick else (tokens, V, REAL_D)


def measure_rows(name: str, arguments: argparse.Namespace, results: dict[str, Any], console: Console) -> None:
    """All rows that are wanted of a data set, each shown as soon as it is done."""
    with console.status(f"{name} data"):
        start = time.perf_counter()
        shape = shape_of(name, arguments)
        arrays = made(name, shape, arguments)
        forward.require_hopper(*arrays)
        timing.wait()
        made_at = time.perf_counter()
        exact = exact_gradients.compute(*arrays)  # waits
        done_at = time.perf_counter()
    data = Data(name, arrays, exact, cublas.product(*arrays[:2]))
    described = data.described() | {"mean_loss": round(exact.loss, 5), "rounding": exact.rounding}
    described |= {"made_s": round(made_at - start, 1), "exact_gradients_s": round(done_at - made_at, 1)}
    results["data"].append(described)
    console.print(backward_tables.data_line(described))
    for i in arguments.rows:
        row = ROWS[i]
        if row.data != name:
            continue
        found = {"number": i + 1, "name": row.name, **data.described(), "options": dict(row.options), "wrt": list(row.wrt)}
        with console.status(f"{row.name}, {name}"):
            try:
                found |= measured(row, data, arguments)
            except Exception as error:  # of this row alone, perhaps; the others are still to be measured
                traceback.print_exc()
                found["wrong"] = f"{type(error).__name__}: {error}"
        results["rows"].append(found)
        console.print(backward_tables.one_line(found))
        if "kernels" in found:
            console.print(backward_tables.kernel_table(found))


def made(name: str, shape: Shape, arguments: argparse.Namespace) -> tuple[Any, Any, Any]:
    """`(e, c, targets)`; what the data before left behind is freed first."""
    cupy.get_default_memory_pool().free_all_blocks()
    if name == "real":
        return inputs.real(arguments.archive, *shape, cupy)
    return calibrated.calibrated(*shape, cupy) if name == "calibrated" else inputs.random(*shape, cupy)


def measured(row: Row, data: Data, arguments: argparse.Namespace) -> dict[str, Any]:
    """All that is measured of a row."""
    found = validated(row, data)
    if "wrong" in found:
        return found
    cupy.get_default_memory_pool().free_all_blocks()  # of the validation
    call = functools.partial(row.call, *data.arrays)
    both = {name: array.nbytes for name, array in zip(("e", "c"), data.arrays[:2], strict=True)}
    found["extra_bytes"] = forward.peak_bytes(call) - sum(both[name] for name in row.wrt)
    limited = row.wrt and not arguments.quick
    found["extra_bytes_at_most"] = int(EXTRA_SHARE * sum(both.values())) if limited else None
    calls = {"cublas": data.product, "call": call}
    timing.warm_up(calls.values(), arguments.warm_up_s)
    times = timing.interleaved(calls, arguments.rounds, arguments.burst)
    found |= {name: record.summary(ms) for name, ms in times.items()}
    found["x"] = timing.ratios(times["call"], times["cublas"])
    found["x_at_most"] = None if arguments.quick else row.x_at_most
    if arguments.profile:
        found["kernels"] = kernel_times.of(call)
    return found


def validated(row: Row, data: Data) -> dict[str, Any]:
    """How it ran, loss, errors and survivors; "wrong" says what is off beyond anything that rounding or a filter explains."""
    result = cce.forward(*data.arrays, **row.options)
    loss, gradients = row.call(*data.arrays)
    found: dict[str, Any] = {
        "how": result.plan.how,
        "mean_loss": round(float(loss), 5),
        "flagged": round(float(result.survivor_counts().mean()) / len(data.arrays[1]), 5),
        "errors": {},
    }
    wrong = []
    if not abs(float(loss) - data.exact.loss) <= _LOSS_ERROR * (1 + abs(data.exact.loss)):
        wrong.append(f"the loss is {float(loss):.5f}, not {data.exact.loss:.5f}")
    for name in row.wrt:
        rounding = data.exact.rounding[name]
        error = exact_gradients.error(getattr(gradients, name), data.exact.gradients[name])
        found["errors"][name] = {"error": error, "rounding": rounding, "at_most": row.error_at_most(name, rounding)}
        if not error <= _WRONG:  # nor is NaN
            wrong.append(f"the error of d{name.upper()} is {error:.3g}")
    if "c" in row.wrt:
        found["zero_rows"] = round(exact_gradients.zero_rows(gradients.c), 5)
    return found | ({"wrong": "; ".join(wrong)} if wrong else {})


if __name__ == "__main__":
    main()
