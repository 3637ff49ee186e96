"""The tensor-core forward against cuBLAS's one product `e @ c.T` (bfloat16), in the same run: X is our time over its time.

    python benchmarks/forward.py --real ARCHIVE.npz --record forward_h100     all shapes, random data and real
    python benchmarks/forward.py --shape 8192 256000 2304                     one shape, random data
    python benchmarks/forward.py --quick                                      small shapes: does it run?

Validated before it is timed, against float64 (`exact`). A GPU's clock follows its power, so the calls take turns: each round
queues cuBLAS, the loss, and the loss with survivor bits, `--burst` times each, and X is the ratio within a round: median, 10th
and 90th percentile over the rounds, after a second of warming up. Nothing waits in between, so these are times of the device,
as long as the host keeps ahead of it. For few tokens, where it may not, CUDA graphs of our calls are timed, too.

All calls read the same e and c, in alternation. c (0.6 to 1.2 GB) is many times the L2 cache (50 MB), so each reads it from
memory, except with --quick; of e, some may be in the cache when a call starts, whichever it is. cuBLAS writes its product to
the same place each time: in equal parts of the vocabulary, one after the other, where it would take more than 3 GB.

Extra memory is the peak of what CuPy's pool hands out during a call, results included. The host's time is that until a call
returns when nothing is queued, for a problem so small that the device does not matter.
"""

from __future__ import annotations

import argparse
import functools
import sys
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import cublas
import cupy
import exact
import forward_tables
import inputs
import numpy as np
import record
import timing
from rich.console import Console

import cce_numba as cce
from cce_numba.commands import machine, measure

CUBLAS, LOSS, BITS = "cuBLAS e @ c.T", "loss", "loss and survivor bits"
Shape = tuple[int, int, int]  # N, V, D
# What X is to be at most.
SHAPES: dict[Shape, dict[str, float]] = {
    (8192, 256_000, 2304): {LOSS: 1.10, BITS: 1.12},
    (8192, 131_072, 4096): {LOSS: 1.10, BITS: 1.12},
    (16_384, 151_936, 2048): {LOSS: 1.10, BITS: 1.12},
    (256, 128_256, 4096): {LOSS: 1.25},
}
QUICK_SHAPES: tuple[Shape, ...] = ((300, 50_001, 640), (1280, 52_000, 584))
FILTER_EPS = 2.0**-16
FEW_TOKENS = 1024  # for which CUDA graphs are timed, too
HOST_SHAPE: Shape = (256, 2048, 128)
HOST_US = 150  # at most
HOST_RUNS = 200


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    if reason := machine.why_no_gpu():
        sys.exit(f"forward: {reason}")
    console = Console(width=160)
    how = {
        "rounds": arguments.rounds,
        "burst": arguments.burst,
        "cublas": cublas.library(),
        "filter_eps": FILTER_EPS,
        "nats_per_copy": inputs.NATS_PER_COPY,
    }
    with console.status("host"):
        us = host_us((cce.linear_cross_entropy, cce.forward), HOST_US)
        results: dict[str, Any] = {"how": how, "host_us": us, "problems": []}
    for shape in arguments.shapes:
        for archive in (None, arguments.archive) if arguments.archive else (None,):
            with console.status(f"{shape}, {'real' if archive else 'random'} data"):
                results["problems"].append(measured(shape, archive, arguments))
            console.print(forward_tables.one_line(results["problems"][-1]))
    console.print(forward_tables.problem_table(results["problems"]), forward_tables.host_table(results["host_us"]))
    if not arguments.archive:
        console.print("Random data alone: no --real ARCHIVE.npz was given.")
    if arguments.record:
        console.print(str(record.write(arguments.record, results)))


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments, and what follows from them: `shapes`, `warm_up_s`, `archive`. Exits if they do not fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--shape", nargs=3, type=int, metavar=("N", "V", "D"), help="this shape alone")
    which.add_argument("--quick", action="store_true", help="small shapes alone")
    parser.add_argument("--real", metavar="ARCHIVE.npz", help="real data, too, from an archive as make_demo_file takes it")
    parser.add_argument("--rounds", type=int, default=20, help="default 20")
    parser.add_argument("--burst", type=int, default=2, help="calls of a kind that a round queues (default 2)")
    parser.add_argument("--record", metavar="NAME", help="write results/NAME.json")
    arguments = parser.parse_args(argv)
    arguments.shapes = [tuple(arguments.shape)] if arguments.shape else list(QUICK_SHAPES if arguments.quick else SHAPES)
    arguments.warm_up_s = 0.1 if arguments.quick else 1.0
    arguments.archive = None
    if min(arguments.rounds, arguments.burst, *arguments.shapes[0]) < 1:
        parser.error("numbers must be at least 1")
    if arguments.real:
        try:
            arguments.archive = inputs.read(arguments.real)
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            parser.error(f"--real: {arguments.real}: {error}")
        for N, V, D in arguments.shapes:
            if reason := arguments.archive.why_not(V, D):
                parser.error(f"--real: cannot be extended to {N} x {V} x {D}: {reason}")
    return arguments


def measured(shape: Shape, archive: inputs.Archive | None, arguments: argparse.Namespace) -> dict[str, Any]:
    """All that is measured of one problem, with random data if there is no archive."""
    N, V, D = shape
    e, c, targets = inputs.real(archive, N, V, D, cupy) if archive else inputs.random(N, V, D, cupy)
    require_hopper(e, c, targets)
    problem = {"N": N, "V": V, "D": D, "data": f"real ({archive.name})" if archive else "random"}
    problem |= validated(e, c, targets)
    cupy.get_default_memory_pool().free_all_blocks()  # of the validation, and before a graph relies on any
    calls = {
        CUBLAS: cublas.product(e, c),
        LOSS: lambda: cce.linear_cross_entropy(e, c, targets),
        BITS: lambda: cce.forward(e, c, targets, filter_eps=FILTER_EPS),
    }
    extra_bytes = {name: peak_bytes(calls[name]) for name in (LOSS, BITS)}
    if N <= FEW_TOKENS:
        try:
            calls |= {f"{name}, graph": timing.captured(calls[name]) for name in (LOSS, BITS)}
        except Exception as error:  # whatever stands in its way, the table tells
            problem["no_graph"] = f"{type(error).__name__}: {error}"
    timing.warm_up(calls.values(), arguments.warm_up_s)
    times = timing.interleaved(calls, arguments.rounds, arguments.burst)
    problem["calls"] = {}
    for name, ms in times.items():
        call: dict[str, Any] = record.summary(ms)
        call["tflops"] = round(2 * N * V * D / call["median_ms"] / 1e9, 1)
        if name != CUBLAS:
            call |= {"x": timing.ratios(ms, times[CUBLAS]), "x_at_most": SHAPES.get(shape, {}).get(name)}
        if name in extra_bytes:
            call |= {"extra_bytes": extra_bytes[name], "extra_bytes_at_most": allowed_bytes(N, V, bits=name == BITS)}
        problem["calls"][name] = call
    return problem


def require_hopper(e: Any, c: Any, targets: Any) -> None:
    """Exits, telling why, if another backend would run."""
    plan = cce.explain(e, c, targets)
    if plan.backend != "hopper":
        sys.exit(f"{plan.backend!r} would run, not 'hopper': {plan.rejected['hopper']}")


def validated(e: Any, c: Any, targets: Any) -> dict[str, Any]:
    """Mean loss, errors and survivors. Raises AssertionError if anything is off, with survivor bits or without."""
    result = cce.forward(e, c, targets, filter_eps=FILTER_EPS)
    loss, lse = cce.linear_cross_entropy(e, c, targets, return_lse=True)
    expected = exact.compute(e, c, targets, result._statistics.survivor_block)
    errors = {
        LOSS: exact.check(expected, lse=lse),
        BITS: exact.check(expected, lse=result.lse, target_logit=result.target_logit),
    }
    mean = float(result.loss)
    if not abs(float(loss) - mean) <= 1e-5 * (1 + abs(mean)):
        raise AssertionError(f"loss: {float(loss)} alone, {mean} with survivor bits")
    return {
        "mean_loss": round(mean, 5),
        "errors_as_shares_of_those_allowed": errors,
        "survivors": exact.check_survivors(expected, result, FILTER_EPS),
    }


def peak_bytes(call: timing.Call) -> int:
    """The most device memory that a call takes at once, what it returns included."""
    with measure.peak_memory(on_device=True) as peak:
        call()
    return peak.value


def allowed_bytes(N: int, V: int, *, bits: bool) -> int:
    """1 MiB and 12 bytes a token, and a bit for each vocabulary entry and 128 tokens."""
    return 2**20 + 12 * N + (-(-N // 128) * -(-V // 8) if bits else 0)


def host_us(functions: Sequence[Callable[..., Any]], at_most: float) -> dict[str, Any]:
    """Microseconds until calls return, by library and function."""
    arrays = inputs.random(*HOST_SHAPE, cupy)
    require_hopper(*arrays)
    libraries = {"CuPy": arrays}
    if cublas.torch_with_cuda() is not None:
        libraries["PyTorch"] = tuple(cublas.as_torch(array) for array in arrays)
    found: dict[str, Any] = {"shape": HOST_SHAPE, "runs": HOST_RUNS, "at_most": at_most}
    for library, its_arrays in libraries.items():
        found[library] = {}
        for function in functions:
            call = functools.partial(function, *its_arrays)
            call()  # compiles
            us = 1e3 * np.array(timing.host_ms(call, HOST_RUNS))
            found[library][function.__name__] = timing.spread(us, digits=1)
    return found


if __name__ == "__main__":
    main()
