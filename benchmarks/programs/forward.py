"""The loss on tensor cores (bfloat16) against cuBLAS's one product `e @ c.T`. X is our time over cuBLAS's in the same run.

    python -m benchmarks forward --data FILE.npz --record forward_h100    all shapes, random data and real
    python -m benchmarks forward --shape 8192 256000 2304                 one shape, random data
    python -m benchmarks forward --quick --data FILE.npz                  the first shape, few rounds
    python -m benchmarks forward --small                                  small shapes: does it run?

Results are compared with float64 before anything is timed. The clock of a GPU follows its power, so the calls take turns:
each round queues cuBLAS, the loss, and the loss with survivor bits, `--burst` times each. X is taken within a round; the
tables show its median, 10th and 90th percentile over the rounds. A second of warming up comes first. Nothing waits between
the calls, so these are times of the device, as long as the host keeps ahead of it. With few tokens the host may not keep
ahead; there, CUDA graphs of our calls are timed as well.

All calls read the same e and c. c (0.6 to 1.2 GB) is many times the L2 cache (50 MB), so each call reads c from memory,
except with --small; some of e may be in the cache when a call starts, whichever call it is. cuBLAS writes its product to
the same place each time: where the product would take more than 3 GB, in equal parts of the vocabulary, one after the
other.

Extra memory is the peak of what CuPy's pool hands out during a call, results included. The host's time is that until a call
returns when nothing is queued, for a problem so small that the device does not matter.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from rich.console import Console

import cce_numba as cce
from benchmarks import options
from benchmarks.data import Inputs, Shape, random, real
from benchmarks.data.archive import Archive
from benchmarks.errors import Wrong
from benchmarks.measure import cublas, device, host, memory, record, timing
from benchmarks.options import Pace
from benchmarks.tables import forward as tables
from benchmarks.tables.forward import BITS, CUBLAS, LOSS
from benchmarks.validate import forward as truth
from cce_numba.commands import UsageError

# What X is to be at most.
SHAPES: dict[Shape, dict[str, float]] = {
    (8192, 256_000, 2304): {LOSS: 1.10, BITS: 1.12},
    (8192, 131_072, 4096): {LOSS: 1.10, BITS: 1.12},
    (16_384, 151_936, 2048): {LOSS: 1.10, BITS: 1.12},
    (256, 128_256, 4096): {LOSS: 1.25},
}
SMALL_SHAPES: tuple[Shape, ...] = ((300, 50_001, 640), (1280, 52_000, 584))
QUICK_SHAPE: Shape = (8192, 256_000, 2304)
QUICK_ROUNDS = 8
FILTER_EPS = 2.0**-12  # of the default filter
FEW_TOKENS = 1024  # up to which CUDA graphs are timed as well
HOST_US = 150  # at most


@dataclass(frozen=True)
class Settings:
    """What to measure: shapes, with real data as well if there is an archive, and how long."""

    shapes: tuple[Shape, ...]
    archive: Archive | None
    pace: Pace

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Settings:
        """Raises UsageError if the arguments do not fit each other or the archive."""
        if arguments.shape:
            shapes: tuple[Shape, ...] = (tuple(arguments.shape),)
        elif arguments.quick:
            shapes = (QUICK_SHAPE,)
        else:
            shapes = SMALL_SHAPES if arguments.small else tuple(SHAPES)
        rounds = arguments.rounds or (QUICK_ROUNDS if arguments.quick else Pace.rounds)
        pace = Pace(rounds, arguments.burst, warm_up_s=0.1 if arguments.small else Pace.warm_up_s)
        return cls(shapes, options.archive_of(arguments), pace).checked()

    def checked(self) -> Settings:
        """Itself. Raises UsageError if the archive cannot be extended to a shape."""
        for N, V, D in self.shapes:
            if self.archive and (reason := self.archive.why_not(V, D)):
                raise UsageError(f"--data: cannot be extended to {N} x {V} x {D}: {reason}")
        return self


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The program's options."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--shape", nargs=3, type=options.positive, metavar=("N", "V", "D"), help="this shape alone")
    which.add_argument("--quick", action="store_true", help=f"the first shape, {QUICK_ROUNDS} rounds, no times of the host")
    which.add_argument("--small", action="store_true", help="small shapes alone")
    options.add_data(parser)
    options.add_pace(parser, rounds=None)
    options.add_record(parser)


def run(arguments: argparse.Namespace) -> None:
    """Measures, shows, records."""
    settings = Settings.of(arguments)
    device.require()
    console = Console(width=160)
    results: dict[str, Any] = {"how": how(settings.pace)}
    if not arguments.quick:
        with console.status("host"):
            results["host_us"] = host.host_us((cce.linear_cross_entropy, cce.forward), HOST_US)
    results["problems"] = measure_problems(settings, console)
    console.print(tables.problem_table(results["problems"]))
    if "host_us" in results:
        console.print(tables.host_table(results["host_us"]))
    if not settings.archive:
        console.print("Random data alone: no --data FILE.npz was given.")
    if arguments.record:
        console.print(str(record.write(arguments.record, results)))


def how(pace: Pace) -> dict[str, Any]:
    """What a record says of how it was measured."""
    return {
        "rounds": pace.rounds,
        "burst": pace.burst,
        "cublas": cublas.library(),
        "filter_eps": FILTER_EPS,
        "nats_per_copy": real.NATS_PER_COPY,
    }


def measure_problems(settings: Settings, console: Console) -> list[dict[str, Any]]:
    """All shapes, with random data and with real data, each shown as soon as it is done."""
    found = []
    for shape in settings.shapes:
        for archive in (None, settings.archive) if settings.archive else (None,):
            with console.status(f"{shape}, {'real' if archive else 'random'} data"):
                found.append(measured(shape, archive, settings.pace))
            console.print(tables.one_line(found[-1]))
    return found


def measured(shape: Shape, archive: Archive | None, pace: Pace) -> dict[str, Any]:
    """All that is measured of one problem, with random data if there is no archive."""
    N, V, D = shape
    device.free_memory()  # which the problem before has left in the pool
    xp = device.cupy()
    inputs = real.make(archive, N, V, D, xp) if archive else random.make(N, V, D, xp)
    device.require_hopper(inputs)
    problem = {"N": N, "V": V, "D": D, "data": f"real ({archive.name})" if archive else "random"}
    problem |= validated(inputs)
    device.free_memory()  # which the validation has left; later a graph may rely on the pool
    calls = {
        CUBLAS: cublas.product(inputs),
        LOSS: lambda: cce.linear_cross_entropy(*inputs),
        BITS: lambda: cce.forward(*inputs, filter_eps=FILTER_EPS),
    }
    extra_bytes = {name: memory.peak_bytes(calls[name]) for name in (LOSS, BITS)}
    if N <= FEW_TOKENS:
        try:
            calls |= {f"{name}, graph": device.captured(calls[name]) for name in (LOSS, BITS)}
        except Exception as error:  # the other calls are still to be timed, and the table tells of this
            problem["no_graph"] = f"{type(error).__name__}: {error}"
    timing.warm_up(calls.values(), pace.warm_up_s)
    times = timing.interleaved(calls, pace.rounds, pace.burst)
    return problem | {"calls": {name: _call(name, shape, times, extra_bytes.get(name)) for name in times}}


def _call(name: str, shape: Shape, times: dict[str, list[float]], extra_bytes: int | None) -> dict[str, Any]:
    """The record of one call."""
    N, V, D = shape
    call: dict[str, Any] = record.summary(times[name])
    call["tflops"] = round(2 * N * V * D / call["median_ms"] / 1e9, 1)
    if name != CUBLAS:
        call |= {"x": timing.ratios(times[name], times[CUBLAS]), "x_at_most": SHAPES.get(shape, {}).get(name)}
    if extra_bytes is not None:
        call |= {"extra_bytes": extra_bytes, "extra_bytes_at_most": allowed_bytes(N, V, bits=name == BITS)}
    return call


def validated(inputs: Inputs) -> dict[str, Any]:
    """Mean loss, errors and survivors. Raises Wrong if anything is off, with survivor bits or without."""
    result = cce.forward(*inputs, filter_eps=FILTER_EPS)
    loss, lse = cce.linear_cross_entropy(*inputs, return_lse=True)
    expected = truth.compute(inputs, result._statistics.survivor_block)
    errors = {
        LOSS: truth.check(expected, lse=lse),
        BITS: truth.check(expected, lse=result.lse, target_logit=result.target_logit),
    }
    mean = float(result.loss)
    if not abs(float(loss) - mean) <= 1e-5 * (1 + abs(mean)):
        raise Wrong(f"loss: {float(loss)} alone, {mean} with survivor bits")
    return {
        "mean_loss": round(mean, 5),
        "errors_as_shares_of_those_allowed": errors,
        "survivors": truth.check_survivors(expected, result, FILTER_EPS),
    }


def allowed_bytes(N: int, V: int, *, bits: bool) -> int:
    """2 MiB and 20 bytes a token; with survivor bits, 4 bytes more, and a bit for each vocabulary entry and 128 tokens."""
    return 2**21 + 20 * N + (4 * N + -(-N // 128) * -(-V // 8) if bits else 0)
