"""Times of methods that take turns with the product `e @ c.T`: a ratio is of one round, at one clock. Imports PyTorch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.measure.cublas import parts_of
from benchmarks.proof.operands import Operands
from benchmarks.proof.rows import Ready

LOSS, GRADIENT, BOTH, PRODUCT = "loss", "gradient", "both", "product"  # of a round, in ms


class Clock:
    """Marks in what a device does: events on a GPU, the time of day on the CPU."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device == "cuda"

    def mark(self) -> Any:
        """The end of what is queued."""
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self) -> None:
        """Waits until all that is queued is done."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def ms(self, start: Any, stop: Any) -> float:
        """Milliseconds between two marks that have happened."""
        return start.elapsed_time(stop) if self.on_gpu else 1e3 * (stop - start)


def product(operands: Operands) -> Callable[[], None]:
    """`e @ c.T` in parts of the vocabulary that one after the other go to the same memory; cuBLAS computes it on a GPU."""
    e, c = operands.e.detach(), operands.c.detach()
    parts = parts_of(len(e), len(c))
    out = e.new_empty(len(e) * parts[0].stop)
    factors = [c[part].T for part in parts]
    places = [out[: len(e) * factor.shape[1]].view(len(e), -1) for factor in factors]

    def call() -> None:
        for factor, place in zip(factors, places, strict=True):
            torch.mm(e, factor, out=place)

    return call


def one_round(
    methods: Sequence[Ready], operands: Operands, multiply: Callable[[], None], clock: Clock
) -> list[dict[str, float]]:
    """Each method once: the loss alone, then the loss with its gradients. Milliseconds for each method, with the product's.

    Nothing waits within the round, so the host runs ahead of the device. The first product keeps the device busy while the
    first method is queued; the second is timed.
    """
    multiply()
    start = clock.mark()
    multiply()
    multiplied = clock.mark()
    marks = []
    for ready in methods:
        row = [clock.mark()]
        ready.loss(operands)
        row.append(clock.mark())
        loss = ready.recorded(operands)
        row.append(clock.mark())
        loss.backward()
        row.append(clock.mark())
        del loss
        operands.drop_gradients()
        marks.append(row)
    clock.wait()
    of_product = clock.ms(start, multiplied)
    return [
        {
            LOSS: clock.ms(row[0], row[1]),
            GRADIENT: clock.ms(row[2], row[3]),
            BOTH: clock.ms(row[1], row[3]),
            PRODUCT: of_product,
        }
        for row in marks
    ]
