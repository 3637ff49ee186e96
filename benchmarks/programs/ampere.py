"""The `mma.sync` kernels beside those of Hopper and the paper's own, in turns; the limit of `mma.sync`; float32.

    python -m benchmarks ampere --data FILE.npz --record ampere_h100    everything, some four minutes on an H100
    python -m benchmarks ampere --parts limit float32                   two of the three parts
    python -m benchmarks ampere --small --rounds 2                      small shapes: does it run?

rows     loss and gradients in bfloat16, on data as `backward` has them, real data if there are some. X is a time over cuBLAS's
         for the one product `e @ c.T` in the same round. "hopper" is there on a Hopper GPU, and the paper's kernels, in Triton,
         where the package `cut_cross_entropy` is installed
limit    kernels that do nothing but `mma.sync` (measure/mma_limit.py), against the same product of cuBLAS
float32  loss, and loss with gradients, on tensor cores against the portable kernels: with float32's accuracy, and rounded to
         tf32. The errors are those of the log-sum-exp against float64

Results are validated before anything is timed; what is wrong is told, and not timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import traceback
from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.console import Console

import cce_numba as cce
from benchmarks import options
from benchmarks.data import Inputs
from benchmarks.errors import Wrong
from benchmarks.measure import cublas, device, memory, mma_limit, record, timing
from benchmarks.measure.device import Call
from benchmarks.options import Pace
from benchmarks.programs import backward, simt
from benchmarks.programs.backward import Data, Row, Settings
from benchmarks.tables import ampere as tables
from cce_numba.commands import machine

PARTS = ("rows", "limit", "float32")
CUBLAS, AMPERE, HOPPER, PAPER = "cublas", "ampere", "hopper", "paper"
BACKENDS = {AMPERE: "ampere", HOPPER: "hopper"}
ROUNDS = 8
ROWS = (
    Row("forward alone", "calibrated", wrt=(), x_at_most=1.75),
    Row("default filter", "calibrated", x_at_most=2.6),
    Row("exact", "calibrated", {"filter_eps": None}, x_at_most=7.5),
    Row("default filter", "real", x_at_most=4.0),
    Row("exact", "real", {"filter_eps": None}),
    Row("forward alone", "random", wrt=(), x_at_most=1.75),
)
# Of float32 on tensor cores: errors of logits over those of FMA at most, and how many times as fast as simt at least.
ERRORS_AT_MOST, SPEED_AT_LEAST = 2.0, 1.5
_LOSS_ERROR = 1e-2  # of the paper's loss, which rounds logits, relative to 1 + loss
_TOKENS = 256  # whose log-sum-exp is computed in float64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The program's options."""
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="these alone")
    parser.add_argument("--small", action="store_true", help="small shapes: does it run?")
    options.add_data(parser)
    options.add_pace(parser, rounds=ROUNDS)
    options.add_record(parser)


def run(arguments: argparse.Namespace) -> None:
    """Measures, shows, records. Raises Wrong if something was wrong; the rest is measured nevertheless."""
    device.require()
    pace = Pace(arguments.rounds, arguments.burst, warm_up_s=0.1 if arguments.small else Pace.warm_up_s)
    archive = options.archive_of(arguments)
    console = Console(width=150)
    results: dict[str, Any] = {"how": {"rounds": pace.rounds, "burst": pace.burst, "cublas": cublas.library()}}
    try:
        if "limit" in arguments.parts:
            results["limit"] = limit(pace.rounds, arguments.small)
            console.print(tables.limit_lines(results["limit"]))
        if "float32" in arguments.parts:
            results["float32"] = in_float32(pace)
            console.print(tables.float32_table(results["float32"]))
        if "rows" in arguments.parts:
            settings = Settings(tuple(range(len(ROWS))), (), archive, pace, small=arguments.small)
            results["data"], results["rows"] = [], []
            measure_rows(settings, results, console)
    finally:  # what was measured before something broke was measured
        if arguments.record and len(results) > 1:
            console.print(str(record.write(arguments.record, results)))
    wrong = [f"{row['name']}, {row['data']}" for row in results.get("rows", ()) if "wrong" in row]
    if "wrong" in results.get("float32", ()):
        wrong.append(f"float32: {results['float32']['wrong']}")
    if wrong:
        raise Wrong("; ".join(wrong))


# ---- rows


def measure_rows(settings: Settings, results: dict[str, Any], console: Console) -> None:
    """All rows for which there are data, data set by data set, each shown as soon as it is done."""
    for name in dict.fromkeys(row.data for row in ROWS):
        if name == "real" and settings.archive is None:
            console.print("Rows of real data are left out: no --data FILE.npz was given.")
            continue
        with console.status(f"{name} data"):
            data, described = backward.prepared(name, settings, require=False)
        results["data"].append(described)
        for row in (row for row in ROWS if row.data == name):
            found = {"name": row.name, **data.described(), "options": dict(row.options), "wrt": list(row.wrt)}
            try:
                found |= measured(row, data, settings)
            except Exception as error:  # the other rows may be right
                traceback.print_exc()
                found["wrong"] = f"{type(error).__name__}: {error}"
            results["rows"].append(found)
            console.print(tables.row_line(found))
        del data


def measured(row: Row, data: Data, settings: Settings) -> dict[str, Any]:
    """Times of a row's calls, in turns; memory and errors of ours."""
    found: dict[str, Any] = {"x_at_most": None if settings.small else row.x_at_most, "calls": {}}
    calls: dict[str, Call] = {CUBLAS: data.product}
    for name, its in ours(row).items():
        judged = backward.validated(its, data)
        if "wrong" in judged:
            return found | {"wrong": f"{name}: {judged['wrong']}"}
        calls[name] = functools.partial(its.call, *data.inputs)
        returned = sum(array.nbytes for key, array in zip(("e", "c"), data.inputs[:2], strict=True) if key in row.wrt)
        found["calls"][name] = {"errors": judged["errors"], "extra_bytes": memory.peak_bytes(calls[name]) - returned}
        found["flagged"] = judged["flagged"]
    paper_call = of_paper(row, data)
    if callable(paper_call):
        calls[PAPER] = paper_call
        found["calls"][PAPER] = {}
    else:
        found["no_paper"] = paper_call
    device.free_memory()
    timing.warm_up(calls.values(), settings.pace.warm_up_s)
    times = timing.interleaved(calls, settings.pace.rounds, settings.pace.burst)
    found[CUBLAS] = record.summary(times[CUBLAS])
    for name, call in found["calls"].items():
        call |= record.summary(times[name]) | {"x": timing.ratios(times[name], times[CUBLAS])}
    return found


def ours(row: Row) -> dict[str, Row]:
    """The row by each of our backends that this machine has."""
    names = [AMPERE, HOPPER] if machine.gpus()[0].compute_capability.startswith("9.") else [AMPERE]
    return {name: dataclasses.replace(row, options={**row.options, "backend": BACKENDS[name]}) for name in names}


def of_paper(row: Row, data: Data) -> Call | str:
    """The row's call by the paper's own kernels, or why there is none."""
    if (torch := device.torch_with_cuda()) is None:
        return "no PyTorch with CUDA"
    from benchmarks.peers import paper

    if reason := paper.why_none("cuda"):
        return f"cut_cross_entropy {reason}"
    criterion = paper.loss("cce_exact" if row.options.get("filter_eps", "auto") is None else "cce")
    e, c, targets = (device.as_torch(array).clone() for array in data.inputs)
    e.requires_grad_("e" in row.wrt)
    c.requires_grad_("c" in row.wrt)

    def call() -> Any:
        if not row.wrt:
            with torch.no_grad():
                return criterion(e, c, targets)
        e.grad = c.grad = None
        loss = criterion(e, c, targets)
        loss.backward()
        return loss

    loss = float(call())
    if not abs(loss - data.exact.loss) <= _LOSS_ERROR * (1 + abs(data.exact.loss)):
        return f"its loss is {loss:.5f}, not {data.exact.loss:.5f}"
    return call


# ---- limit


def limit(rounds: int, small: bool) -> dict[str, Any]:
    """What `mma.sync` alone would take for the first shape of `backward`, against cuBLAS's product of it."""
    xp, (N, V, D) = device.cupy(), (300, 5000, 584) if small else backward.SHAPES["calibrated"]
    rng = xp.random.default_rng(0)
    e, c = (rng.standard_normal((rows, D), dtype=np.float32).astype(cce.interchange.BFLOAT16) for rows in (N, V))
    product = cublas.product(Inputs(e, c, xp.zeros(N, np.int64)))
    return {"N": N, "V": V, "D": D, "ways": mma_limit.measured(product, 2 * N * V * D, rounds)}


# ---- float32


FLOAT32_WAYS: Mapping[str, dict[str, Any]] = {
    "simt": {"backend": "simt"},
    "float32": {"backend": "ampere"},
    "tf32": {"backend": "ampere", "allow_tf32": True},
}


def in_float32(pace: Pace) -> dict[str, Any]:
    """Errors, then times of loss, and of loss with exact gradients, by each way."""
    inputs = simt.made()
    exact = exact_lse(inputs)
    found: dict[str, Any] = dict(zip("NVD", inputs.shape, strict=True)) | {"errors": {}, "calls": {}}
    for name, way in FLOAT32_WAYS.items():
        lse = cce.linear_logsumexp(inputs.e[:_TOKENS], inputs.c, **way)
        off = (lse.astype(np.float64) - exact) / (1 + abs(exact))
        found["errors"][name] = float((off**2).mean() ** 0.5)
    if not found["errors"]["float32"] <= ERRORS_AT_MOST * found["errors"]["simt"]:
        found["wrong"] = "the log-sum-exp is {float32:.3g} off, and by FMA {simt:.3g}".format(**found["errors"])
    calls: dict[str, Call] = {}
    for name, way in FLOAT32_WAYS.items():
        calls[f"loss, {name}"] = functools.partial(cce.linear_cross_entropy, *inputs, **way)
        with_grad = functools.partial(cce.linear_cross_entropy_with_grad, *inputs, filter_eps=None, **way)
        calls[f"loss and gradients, {name}"] = with_grad
    timing.warm_up(calls.values(), pace.warm_up_s)
    times = timing.interleaved(calls, pace.rounds, pace.burst)
    for name, ms in times.items():
        what = name.partition(", ")[0]
        found["calls"][name] = record.summary(ms) | {"speed": timing.ratios(times[f"{what}, simt"], ms)}
    return found | {"errors_at_most": ERRORS_AT_MOST, "speed_at_least": SPEED_AT_LEAST}


def exact_lse(inputs: Inputs) -> Any:
    """(_TOKENS,) float64."""
    xp = cce.interchange.array_module(inputs.e)
    z = inputs.e[:_TOKENS].astype(np.float64) @ inputs.c.T.astype(np.float64)
    largest = z.max(axis=1, keepdims=True)
    return xp.log(xp.exp(z - largest).sum(axis=1)) + largest[:, 0]
