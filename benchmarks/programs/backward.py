"""Loss and gradients on tensor cores (bfloat16) against cuBLAS's one product `e @ c.T`. X is our time over cuBLAS's.

    python -m benchmarks backward --data FILE.npz --record backward_h100        all rows
    python -m benchmarks backward --rows 1 exact --rounds 5 --profile           some rows, and which kernels take how long
    python -m benchmarks backward --quick --data FILE.npz                       the first six rows, few rounds
    python -m benchmarks backward --small                                       small shapes: does it run?

A row is a call with its options, on one of three data sets: made-up inputs as sparse as those of a real model with a
vocabulary of 256 000 (data/calibrated.py), a real last layer with its hidden size lifted (data/real.py), and random inputs.
A data set is made once for all its rows, and so are the gradients that float32 mathematics gives (validate/gradients.py). A
row whose gradients are far from these, or that raises, is reported as wrong and not timed. Times are taken as in `forward`:
in turns with cuBLAS, X within a round.

Extra memory is the peak of what CuPy's pool hands out during a call, less the gradients that the call returns. "Flagged" is
the share of the vocabulary that a block of tokens keeps; "zero rows" is the share of dC's rows that are zero as a whole.
"""

from __future__ import annotations

import argparse
import functools
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

import cce_numba as cce
from benchmarks import options
from benchmarks.data import Inputs, Shape, calibrated, random, real
from benchmarks.data.archive import Archive
from benchmarks.errors import Wrong
from benchmarks.measure import cublas, device, host, kernel_times, memory, record, timing
from benchmarks.measure.device import Call
from benchmarks.options import Pace
from benchmarks.tables import backward as tables
from benchmarks.tables.forward import host_table
from benchmarks.validate import gradients as truth
from benchmarks.validate.gradients import ExactGradients
from cce_numba.commands import UsageError

SHAPES: dict[str, Shape] = {"calibrated": (8192, 256_000, 2304), "random": (8192, 131_072, 4096)}
REAL_D = 2304  # to which an archive's hidden size is lifted; N and V are its own
SMALL_SHAPE: Shape = (300, 5000, 584)  # real data take N and D of it
HOST_US = 1000  # at most
QUICK_ROUNDS = 8
_EXTRA_SHARE = 0.12  # extra memory at most, as a share of the bytes of both gradients
_FILTERED_ERRORS = {"e": 3e-3, "c": 4e-3}  # at most, of filtered gradients, on data like those of real models
_EXACT_ERRORS = 2  # at most, of exact gradients, in errors of rounding
_WRONG = 0.1  # an error that no rounding and no filter makes
_LOSS_ERROR = 1e-4  # relative to 1 + loss


@dataclass(frozen=True)
class Row:
    """A call to be measured.

    Attributes:
        name: what is special about it.
        data: the data set.
        options: options of the loss.
        wrt: the gradients that it computes; none means the forward alone.
        x_at_most: what X is to be at most.
    """

    name: str
    data: str
    options: Mapping[str, Any] = field(default_factory=dict)
    wrt: tuple[str, ...] = ("e", "c")
    x_at_most: float | None = None

    def call(self, e: Any, c: Any, targets: Any) -> tuple[Any, Any]:
        """The loss and the gradients; in place of the latter None for the forward alone."""
        if not self.wrt:
            return cce.forward(e, c, targets, **self.options).loss, None
        return cce.linear_cross_entropy_with_grad(e, c, targets, wrt=self.wrt, **self.options)

    def error_at_most(self, gradient: str, rounding: float) -> float | None:
        """What the error of gradient "e" or "c" is to be at most, given the error of rounding the exact one."""
        if self.options.get("filter_eps", "auto") is None or not self.options.get(f"filter_{gradient}_grad", True):
            return _EXACT_ERRORS * rounding
        return _FILTERED_ERRORS[gradient] if self.data != "random" and self.options.get("filter") != "drop" else None


ROWS = (
    Row("default filter", "calibrated", x_at_most=1.5),
    Row("default filter", "real", x_at_most=2.4),
    Row("exact", "calibrated", {"filter_eps": None}, x_at_most=4.15),
    Row("exact dC", "calibrated", {"filter_c_grad": False}, x_at_most=3.2),
    Row("frozen classifier", "calibrated", wrt=("e",), x_at_most=1.3),
    Row("frozen body", "calibrated", wrt=("c",)),
    Row("exact", "real", {"filter_eps": None}, x_at_most=4.15),
    Row("default filter", "random", x_at_most=4.2),
    Row("forward alone", "calibrated", wrt=()),
    Row("forward alone", "real", wrt=()),
    Row("unbiased at 2^-13", "calibrated", {"filter_eps": 2.0**-13}),
    Row("unbiased at 2^-13", "real", {"filter_eps": 2.0**-13}),
    Row("filter that drops", "calibrated", {"filter": "drop"}),
    Row("filter that drops", "real", {"filter": "drop"}),
    Row("exact", "random", {"filter_eps": None}, x_at_most=4.15),
    Row("exact dC", "random", {"filter_c_grad": False}, x_at_most=4.2),
    Row("exact, 1.5 GiB of kept logits", "random", {"filter_eps": None, "workspace_bytes": 3 * 2**29}, x_at_most=3.5),
    Row("exact, 512 MiB of kept logits", "random", {"filter_eps": None, "workspace_bytes": 2**29}),
)
QUICK_ROWS = tuple(range(6))


@dataclass(frozen=True)
class Data:
    """A data set, what its gradients must be, and cuBLAS's product of it."""

    name: str
    inputs: Inputs
    exact: ExactGradients
    product: Call

    def described(self) -> dict[str, Any]:
        """Name and shape."""
        return {"data": self.name, **dict(zip("NVD", self.inputs.shape, strict=True))}


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
        rows: places in `ROWS`.
        left_out: places of rows that are wanted, but need an archive.
        archive: where real data come from, or None.
        pace: how long to measure.
        small: small shapes, without limits for time and memory.
        profile: whether the times of each row's kernels are recorded as well.
    """

    rows: tuple[int, ...]
    left_out: tuple[int, ...]
    archive: Archive | None
    pace: Pace
    small: bool = False
    profile: bool = False

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Settings:
        """Raises UsageError if the arguments do not fit each other or the archive."""
        wanted = rows_named(arguments.rows) if arguments.rows else QUICK_ROWS if arguments.quick else tuple(range(len(ROWS)))
        archive = options.archive_of(arguments)
        rounds = arguments.rounds or (QUICK_ROUNDS if arguments.quick else Pace.rounds)
        pace = Pace(rounds, arguments.burst, warm_up_s=0.1 if arguments.small else Pace.warm_up_s)
        return cls.chosen(wanted, archive, pace, small=arguments.small, profile=arguments.profile)

    @classmethod
    def chosen(cls, wanted: tuple[int, ...], archive: Archive | None, pace: Pace, **named: bool) -> Settings:
        """Settings for the wanted rows for which there are data. Raises UsageError as `of` does."""
        left_out = tuple(i for i in wanted if ROWS[i].data == "real" and not archive)
        rows = tuple(i for i in wanted if i not in left_out)
        return cls(rows, left_out, archive, pace, **named).checked()

    def checked(self) -> Settings:
        """Itself. Raises UsageError if no row is left, or the archive cannot be lifted."""
        if not self.rows:
            raise UsageError("--rows: real data need --data FILE.npz")
        if self.archive:
            _, V, D = self.shape_of("real")
            if reason := self.archive.why_not(V, D):
                raise UsageError(f"--data: cannot be lifted to a hidden size of {D}: {reason}")
        return self

    def shape_of(self, data: str) -> Shape:
        """N, V and D of a data set; a real one has the archive's tokens and entries."""
        if data != "real":
            return SMALL_SHAPE if self.small else SHAPES[data]
        assert self.archive is not None
        tokens, V = len(self.archive.e), len(self.archive.c)
        return (min(SMALL_SHAPE[0], tokens), V, SMALL_SHAPE[2]) if self.small else (tokens, V, REAL_D)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The program's options."""
    parser.add_argument("--rows", nargs="+", metavar="ROW", help=f"these alone, by number or a part of the name: {_known()}")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help=f"the first six rows, {QUICK_ROUNDS} rounds, no times of the host")
    size.add_argument("--small", action="store_true", help="small shapes, without limits for time and memory")
    parser.add_argument("--profile", action="store_true", help="show the times of each row's kernels as well (needs PyTorch)")
    options.add_data(parser)
    options.add_pace(parser, rounds=None)
    options.add_record(parser)


def run(arguments: argparse.Namespace) -> None:
    """Measures, shows, records. Raises Wrong if a row was wrong; the others are measured nevertheless."""
    settings = Settings.of(arguments)
    device.require()
    console = Console(width=180)
    results = empty_results(settings.pace)
    try:
        measure_rows(settings, results, console)
        if not arguments.quick:
            with console.status("host"):
                results["host_us"] = host.host_us((cce.linear_cross_entropy_with_grad,), HOST_US)
    finally:  # what was measured before something broke was measured
        results["rows"].sort(key=lambda row: row["number"])
        if results["rows"]:
            console.print(tables.row_table(results))
        if "host_us" in results:
            console.print(host_table(results["host_us"]))
        if settings.left_out:
            numbers = ", ".join(str(i + 1) for i in settings.left_out)
            console.print(f"Rows {numbers} are left out: they are about real data, and no --data FILE.npz was given.")
        if arguments.record and results["rows"]:
            console.print(str(record.write(arguments.record, results)))
    require_right(results)


def rows_named(wanted: list[str]) -> tuple[int, ...]:
    """Places in `ROWS` of rows that are wanted by number or by a part of the name. Raises UsageError if there is none."""
    for what in wanted:
        if not any(_matches(i, what) for i in range(len(ROWS))):
            raise UsageError(f"--rows: there is no {what!r} among {_known()}")
    return tuple(i for i in range(len(ROWS)) if any(_matches(i, what) for what in wanted))


def _matches(i: int, what: str) -> bool:
    return what == str(i + 1) if what.isdigit() else what in f"{ROWS[i].name}, {ROWS[i].data}"


def _known() -> str:
    return "; ".join(f"{i} {row.name}, {row.data}" for i, row in enumerate(ROWS, 1))


def empty_results(pace: Pace) -> dict[str, Any]:
    """A record in which nothing is measured yet."""
    return {"how": {"rounds": pace.rounds, "burst": pace.burst, "cublas": cublas.library()}, "data": [], "rows": []}


def require_right(results: dict[str, Any]) -> None:
    """Raises Wrong, naming the rows that were."""
    if wrong := [str(row["number"]) for row in results["rows"] if "wrong" in row]:
        raise Wrong(f"not timed: rows {', '.join(wrong)}")


def measure_rows(settings: Settings, results: dict[str, Any], console: Console) -> None:
    """All rows, data set by data set, each added to the results and shown as soon as it is done."""
    for name in dict.fromkeys(ROWS[i].data for i in settings.rows):
        with console.status(f"{name} data"):
            data, described = prepared(name, settings)
        results["data"].append(described)
        console.print(tables.data_line(described))
        for i in settings.rows:
            row = ROWS[i]
            if row.data != name:
                continue
            found = {"number": i + 1, "name": row.name, **data.described(), "options": dict(row.options), "wrt": list(row.wrt)}
            with console.status(f"{row.name}, {name}"):
                try:
                    found |= measured(row, data, settings)
                except Exception as error:  # the other rows may be right
                    traceback.print_exc()
                    found["wrong"] = f"{type(error).__name__}: {error}"
            results["rows"].append(found)
            console.print(tables.one_line(found))
            if "kernels" in found:
                console.print(tables.kernel_table(found))
        del data


def prepared(name: str, settings: Settings, *, require: bool = True) -> tuple[Data, dict[str, Any]]:
    """A data set, and what a record says of it. require: Hopper's kernels must be those that would be chosen."""
    device.free_memory()  # which the data set before has left in the pool
    start = time.perf_counter()
    inputs = made(name, settings)
    if require:
        device.require_hopper(inputs)
    device.wait()
    made_at = time.perf_counter()
    exact = truth.compute(inputs)  # waits
    done_at = time.perf_counter()
    data = Data(name, inputs, exact, cublas.product(inputs))
    described = data.described() | {"mean_loss": round(exact.loss, 5), "rounding": exact.rounding}
    return data, described | {"made_s": round(made_at - start, 1), "exact_gradients_s": round(done_at - made_at, 1)}


def made(name: str, settings: Settings) -> Inputs:
    """The inputs of a data set."""
    shape, xp = settings.shape_of(name), device.cupy()
    if name == "real":
        assert settings.archive is not None
        return real.make(settings.archive, *shape, xp)
    return calibrated.make(*shape, xp) if name == "calibrated" else random.make(*shape, xp)


def measured(row: Row, data: Data, settings: Settings) -> dict[str, Any]:
    """All that is measured of a row."""
    found = validated(row, data)
    if "wrong" in found:
        return found
    device.free_memory()  # which the validation has left in the pool
    call: Call = functools.partial(row.call, *data.inputs)
    both = {name: array.nbytes for name, array in zip(("e", "c"), data.inputs[:2], strict=True)}
    found["extra_bytes"] = memory.peak_bytes(call) - sum(both[name] for name in row.wrt)
    limited = row.wrt and not settings.small
    found["extra_bytes_at_most"] = int(_EXTRA_SHARE * sum(both.values())) if limited else None
    calls: dict[str, Call] = {"cublas": data.product, "call": call}
    timing.warm_up(calls.values(), settings.pace.warm_up_s)
    times = timing.interleaved(calls, settings.pace.rounds, settings.pace.burst)
    found |= {name: record.summary(ms) for name, ms in times.items()}
    found["x"] = timing.ratios(times["call"], times["cublas"])
    found["x_at_most"] = None if settings.small else row.x_at_most
    if settings.profile:
        found["kernels"] = kernel_times.of(call)
    return found


def validated(row: Row, data: Data) -> dict[str, Any]:
    """How the row ran, its loss, errors and survivors; "wrong" says what neither rounding nor a filter explains."""
    result = cce.forward(*data.inputs, **row.options)
    loss, gradients = row.call(*data.inputs)
    found: dict[str, Any] = {
        "how": result.plan.how,
        "filter": result.plan.filter,
        "mean_loss": round(float(loss), 5),
        "flagged": round(float(result.survivor_counts().mean()) / len(data.inputs.c), 5),
        "errors": {},
    }
    wrong = []
    if not abs(float(loss) - data.exact.loss) <= _LOSS_ERROR * (1 + abs(data.exact.loss)):
        wrong.append(f"the loss is {float(loss):.5f}, not {data.exact.loss:.5f}")
    for name in row.wrt:
        rounding = data.exact.rounding[name]
        error = truth.error(getattr(gradients, name), data.exact.gradients[name])
        found["errors"][name] = {"error": error, "rounding": rounding, "at_most": row.error_at_most(name, rounding)}
        if not error <= _WRONG:  # so written, NaN is wrong as well
            wrong.append(f"the error of d{name.upper()} is {error:.3g}")
    if "c" in row.wrt:
        found["zero_rows"] = round(truth.zero_rows(gradients.c), 5)
    return found | ({"wrong": "; ".join(wrong)} if wrong else {})
