"""Forward and backward with few rounds: under two minutes on an H100 with compiled kernels in the cache, one short table.

    python -m benchmarks quick --data FILE.npz

Run it before and after a change, on the same machine, from two checkouts. Like `forward --quick` and `backward --quick` it
validates before it times: the loss with random and with real data, gradients with calibrated and with real data. Without
--data the real data are left out. X is a time over cuBLAS's for the one product `e @ c.T` in the same round; the table has
its median, 10th and 90th percentile. Errors of the loss are shares of what is allowed; errors of dE and dC are relative to
float32 mathematics, in 1/1000.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from rich.console import Console

from benchmarks import options
from benchmarks.measure import device, record
from benchmarks.options import Pace
from benchmarks.programs import backward, forward
from benchmarks.tables.quick import quick_table

ROUNDS = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The program's options."""
    parser.add_argument("--small", action="store_true", help="small shapes: does it run?")
    options.add_data(parser)
    options.add_pace(parser, rounds=ROUNDS)
    options.add_record(parser)


def run(arguments: argparse.Namespace) -> None:
    """Measures both, prints the table. Raises Wrong if a row of the backward was wrong."""
    start = time.perf_counter()
    archive, small = options.archive_of(arguments), arguments.small
    pace = Pace(arguments.rounds, arguments.burst, warm_up_s=0.1 if small else Pace.warm_up_s)
    shapes = forward.SMALL_SHAPES[:1] if small else (forward.QUICK_SHAPE,)
    of_forward = forward.Settings(shapes, archive, pace).checked()
    of_backward = backward.Settings.chosen(backward.QUICK_ROWS, archive, pace, small=small)
    device.require()
    console = Console(width=170)
    results: dict[str, Any] = {"forward": {"how": forward.how(pace)}, "backward": backward.empty_results(pace)}
    results["forward"]["problems"] = forward.measure_problems(of_forward, console)
    backward.measure_rows(of_backward, results["backward"], console)
    seconds = time.perf_counter() - start
    console.print(quick_table(results, f"{record.commit() or 'no commit'}, {record.gpu() or 'no GPU'}, {seconds:.0f} s"))
    if archive is None:
        console.print("Without real data: no --data FILE.npz was given.")
    if arguments.record:
        console.print(str(record.write(arguments.record, results)))
    backward.require_right(results["backward"])
