"""A training step of a small transformer (bfloat16): forward, backward and AdamW, with our loss and with stored logits.

    python -m benchmarks training_step --record training_step_h100
    python -m benchmarks training_step --tied                         the embedding is the head as well
    python -m benchmarks training_step --small                        small shapes: does it run?

There are three ways to take a step: eager; with model and loss under `torch.compile(fullgraph=True)`; and that step
replayed from a CUDA graph. The baseline is `F.cross_entropy((e @ c.T).float(), targets)`. Eagerly it is measured as it
stands and compiled; compiled with the model, both are one.

All losses take the same steps on one batch, from a model that stored logits have taught which entries occur at all, one in
sixteen. A block of that model keeps 6 % of the vocabulary and drops 1 % of the probability or less, about as a block of a
real model does. A model that knows nothing would give every entry of a large vocabulary less than the filter's threshold.
Memory is the peak of a step (for a graph, of its capture), less parameters and the optimizer's state. Times are taken at a
learning rate of 0, so that all steps have the same to do.
"""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console

import cce_numba.torch as cct
from benchmarks import options
from benchmarks.errors import Wrong
from benchmarks.measure import record, timing
from benchmarks.measure.device import Call
from benchmarks.options import Pace
from benchmarks.peers import stored_logits as peer
from benchmarks.programs.autograd import require_torch
from benchmarks.tables import training_step as tables
from benchmarks.tables.autograd import COMPILED_LOSS, OURS, STORED
from benchmarks.training import trainer as training
from benchmarks.training.trainer import Loss, Trainer
from benchmarks.training.transformer import Size

EAGER, COMPILED, GRAPH = "eager", "compiled", "CUDA graph"
SIZE = Size(sequences=8, length=1024, vocabulary=131_072, hidden=768, layers=4, heads=12)
SMALL_SIZE = Size(sequences=2, length=256, vocabulary=8192, hidden=256, layers=2, heads=4)
STEPS = 10  # after which losses must agree
# Losses may differ by this share of what the loss falls by in these steps: gradients are off by 0.2 to 0.5 % by rounding
# and by the filter. They may also differ by the probability that the filter leaves out of a step.
_APART = 0.02


@dataclass(frozen=True)
class Course:
    """The state from which all take their steps, what the losses then are to be, and how far apart they may be."""

    start: list[torch.Tensor]
    losses: list[float]
    allowed: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The program's options."""
    parser.add_argument("--small", action="store_true", help="a small model and batch")
    parser.add_argument("--tied", action="store_true", help="the transformer's embedding is its head as well")
    options.add_pace(parser, bursts=False)
    options.add_record(parser)


def run(arguments: argparse.Namespace) -> None:
    """Measures, shows, records. Raises Wrong if a way was wrong; the others are measured nevertheless."""
    require_torch()
    pace = Pace(arguments.rounds, burst=1, warm_up_s=0.1 if arguments.small else Pace.warm_up_s)
    console = Console(width=180)
    step: dict[str, Any] = {"rows": []}
    start = time.perf_counter()
    try:
        measure_steps(SMALL_SIZE if arguments.small else SIZE, arguments.tied, pace, step, console)
    finally:  # what was measured before something broke was measured
        if step["rows"]:
            console.print(tables.step_table(step))
        console.print(f"{time.perf_counter() - start:.0f} s")
        if arguments.record:
            console.print(str(record.write(arguments.record, {"how": {"rounds": pace.rounds, "burst": 1}, "step": step})))
    if wrong := [f"{row['way']}, {row['loss']}" for row in step["rows"] if "wrong" in row]:
        raise Wrong(f"not timed: {'; '.join(wrong)}")


def measure_steps(size: Size, tied: bool, pace: Pace, results: dict[str, Any], console: Console) -> None:
    """Every way with every loss: first whether it learns as it should, then how fast, in turns."""
    trainer = Trainer(size, tied)
    losses = losses_of(trainer)
    results |= {"size": asdict(size), "tied": tied, "steps": STEPS, "learning_rate": training.LEARNING_RATE}
    with console.status("learning with stored logits"):
        course = course_of(trainer, losses[EAGER][STORED], results)
    console.print(tables.learned_line(results))
    steps: dict[tuple[str, str], Call] = {}
    for way, by_name in losses.items():
        for name, loss in by_name.items():
            with console.status(f"{name}, {way}"):
                found, step = checked(trainer, way, loss, course)
            results["rows"].append({"way": way, "loss": name} | found)
            if "wrong" not in found:
                steps[way, name] = step
            console.print(tables.one_line(results["rows"][-1]))
    with console.status("steps, in turns"):
        trainer.restore(course.start, learning_rate=0.0)
        timing.warm_up(steps.values(), pace.warm_up_s)
        times = timing.interleaved(steps, pace.rounds, pace.burst)
    for row in results["rows"]:
        if ms := times.get((row["way"], row["loss"])):
            row |= record.summary(ms)
            row["tokens_per_s"] = round(1e3 * trainer.tokens.numel() / row["median_ms"])


def course_of(trainer: Trainer, loss: Loss, results: dict[str, Any]) -> Course:
    """What this loss teaches the model and then does in `STEPS` steps; the results tell of it."""
    results["learned_loss"] = round(trainer.learn(loss), 5)
    start = [x.clone() for x in trainer.state()]
    results |= trainer.sparsity()
    losses = [float(trainer.step(loss)) for _ in range(STEPS)]
    allowed = _APART * (losses[0] - losses[-1]) + results["dropped"]
    results |= {"first_loss": round(losses[0], 5), "last_loss": round(losses[-1], 5), "apart_at_most": round(allowed, 5)}
    return Course(start, losses, allowed)


def losses_of(trainer: Trainer) -> dict[str, dict[str, Loss]]:
    """Losses by way and name. Nothing is compiled before it is called, and a graph captures what was compiled."""
    eager = {OURS: trainer.loss(cct.linear_cross_entropy), STORED: trainer.loss(peer.stored_logits)}
    whole = {name: peer.compiled(loss) for name, loss in eager.items()}
    return {EAGER: eager | {COMPILED_LOSS: trainer.loss(peer.compiled(peer.stored_logits))}, COMPILED: whole, GRAPH: whole}


def checked(trainer: Trainer, way: str, loss: Loss, course: Course) -> tuple[dict[str, Any], Any]:
    """What there is to tell before it is timed, and the step; None in its place if it failed."""
    began = time.perf_counter()
    prepare: Callable[[Call], tuple[Call, int]] = training.captured if way == GRAPH else training.with_peak
    try:
        step, peak_bytes = prepare(lambda: trainer.step(loss))
        found = {"peak_bytes": peak_bytes, "prepared_s": round(time.perf_counter() - began, 1)}
        return found | agreement(trainer, step, course), step
    except Exception as problem:  # the other ways may be right
        traceback.print_exc()
        trainer.optimizer.zero_grad()
        return {"wrong": f"{type(problem).__name__}: {problem}"}, None


def agreement(trainer: Trainer, step: Call, course: Course) -> dict[str, Any]:
    """The loss at the last of the course's steps, and how far any of them is from the one expected."""
    trainer.restore(course.start)
    losses = [float(step()) for _ in course.losses]
    apart = float(np.abs(np.subtract(losses, course.losses)).max())
    found: dict[str, Any] = {"last_loss": round(losses[-1], 5), "apart": round(apart, 5)}
    if not apart <= course.allowed:  # so written, NaN is wrong as well
        found["wrong"] = f"losses are up to {apart:.4f} from those of stored logits, not {course.allowed:.4f} at most"
    return found
