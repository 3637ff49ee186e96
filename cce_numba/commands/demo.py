"""`python -m cce_numba demo`: the loss and gradients of a problem, with what they cost and how right they are."""

from __future__ import annotations

import argparse
import importlib
import math
import sys
from typing import Any

import numpy as np
from rich.console import Console

import cce_numba as cce
from cce_numba.commands import Exit, UsageError, machine, show
from cce_numba.commands.agreement import Computed, compare
from cce_numba.commands.measure import peak_memory, progress, stopwatch, to_host
from cce_numba.commands.problems import IGNORE_INDEX, DemoProblem, load, synthetic
from cce_numba.commands.report import Report
from cce_numba.survivors import unpack_survivors

# tokens, vocabulary, dim and dtype where the user does not say: seconds of work on two CPU cores, on a GPU, in the simulator
_SIZES = {
    "cpu": (4096, 49152, 512, "float32"),
    "gpu": (8192, 131072, 1024, "bfloat16"),
    "simulator": (8, 48, 16, "float32"),
}


def run(arguments: argparse.Namespace) -> int:
    """Runs the demo and returns the exit code."""
    where = _where(arguments.backend)
    options = {"backend": arguments.backend, "filter": arguments.filter, "filter_eps": arguments.filter_eps}
    # Whether the backend can run at all is known before a large problem is made or read.
    cce.explain(*_arrays(synthetic(1, 8, 8), where), **options)
    console = Console(stderr=True)
    with progress(console, "preparing the problem"):
        problem = _problem(arguments, where)
    report = _measure(problem, where, options, arguments.seed, console)
    show.demo_as_json(report) if arguments.json else show.demo(report)
    if report.agreement.passed:
        return Exit.FINE
    wrong = ", ".join(check.name for check in report.agreement.checks if not check.passed)
    print(f"cce_numba: error: does not agree with float64 mathematics: {wrong}", file=sys.stderr)
    return Exit.DISAGREES


def _where(backend: str | None) -> str:
    """Where the arrays are put: "cpu", "gpu" or "simulator", which takes arrays of the host."""
    if backend == "cpu":
        return "cpu"
    if machine.simulated():
        return "simulator"
    return "gpu" if machine.why_no_gpu() is None else "cpu"


def _problem(arguments: argparse.Namespace, where: str) -> DemoProblem:
    if arguments.data is not None:
        if arguments.vocab is not None or arguments.dim is not None:
            raise UsageError("--vocab and --dim size the problem to make, but with --data the file has its sizes")
        return load(arguments.data, arguments.tokens, arguments.dtype)
    tokens, vocab, dim, dtype = _SIZES[where]
    sizes = arguments.tokens or tokens, arguments.vocab or vocab, arguments.dim or dim
    return synthetic(*sizes, seed=arguments.seed).astype(arguments.dtype or dtype)


def _arrays(problem: DemoProblem, where: str) -> tuple[Any, Any, Any]:
    """e, c and targets where the backend wants them."""
    arrays = problem.e, problem.c, problem.targets
    return tuple(map(importlib.import_module("cupy").asarray, arrays)) if where == "gpu" else arrays


def _measure(problem: DemoProblem, where: str, options: dict[str, Any], seed: int, console: Console) -> Report:
    on_device = where == "gpu"
    arrays = _arrays(problem, where)
    with progress(console, "compiling"), stopwatch(on_device) as compiling:
        if where != "simulator":
            _compile(problem, arrays, on_device, options)
    with progress(console, "loss"), stopwatch(on_device) as loss_time:
        cce.linear_cross_entropy(*arrays, **options)
    with progress(console, "loss and gradients"), peak_memory(on_device) as peak, stopwatch(on_device) as grad_time:
        result = cce.forward(*arrays, **options)
        grads = cce.backward(result)
    computed = _on_host(result, grads)
    with progress(console, "comparing with float64"):
        agreement = compare(problem, computed, seed)
    counting = problem.targets != IGNORE_INDEX
    return Report(
        problem=problem,
        counting=int(counting.sum()),
        plan=result.plan,
        loss=computed.loss,
        known_loss=None if problem.known_loss is None else float(problem.known_loss[counting].mean(dtype=np.float64)),
        norm_d_e=_norm(computed.d_e),
        norm_d_c=_norm(computed.d_c),
        filter_name=result._problem.options.filter if result._problem.options.filters else None,
        filter_eps=computed.filter_eps,
        survivor_block=computed.block,
        survivors=None if computed.kept is None else float(result.survivor_counts().mean()) / len(problem.c),
        compile_seconds=None if where == "simulator" else compiling.value,
        loss_seconds=loss_time.value,
        grad_seconds=grad_time.value,
        peak_bytes=peak.value,
        grad_bytes=computed.d_e.nbytes + computed.d_c.nbytes,
        agreement=agreement,
    )


def _compile(problem: DemoProblem, arrays: tuple[Any, Any, Any], on_device: bool, options: dict[str, Any]) -> None:
    """Calls everything once. On the host a piece of the problem will do; on a GPU the kernels may depend on the sizes."""
    thresholds = [options["filter_eps"]]
    if not on_device:
        e, c, targets = problem.e[:256], problem.c[:512], problem.targets[:256]
        arrays = e, c, np.where(targets == IGNORE_INDEX, IGNORE_INDEX, targets % len(c))
        if thresholds != [None]:
            thresholds.append(0.5)  # so that something is dropped, even of the piece
    cce.linear_cross_entropy(*arrays, **options)
    for filter_eps in thresholds:
        cce.backward(cce.forward(*arrays, **options | {"filter_eps": filter_eps}))


def _on_host(result: cce.Result, grads: cce.Gradients) -> Computed:
    statistics, V = result._statistics, result._problem.V
    return Computed(
        loss=float(to_host(result.loss)),
        nll=to_host(result.nll),
        lse=to_host(result.lse),
        d_e=to_host(grads.e),
        d_c=to_host(grads.c),
        kept=None if statistics.survivors is None else unpack_survivors(statistics, V),
        block=statistics.survivor_block,
        filter_eps=result._problem.options.filter_eps,
        coarse_eps=result.plan.coarse_eps,
        draw_seed=None if statistics.draw_seed is None else int(statistics.draw_seed),
    )


def _norm(gradient: np.ndarray) -> float:
    """Frobenius norm in float64, without a float64 copy of it all."""
    step = 4096
    parts = (gradient[start : start + step].astype(np.float64) for start in range(0, len(gradient), step))
    return math.sqrt(sum(float(np.vdot(part, part)) for part in parts))
