"""One run of `learning`: a transformer learns text from scratch, its loss's gradients taken in one way. Imports PyTorch.

Parameters and AdamW's state are float32. On a GPU the model runs under autocast in bfloat16, and the loss takes embeddings and
head rounded to bfloat16. On the CPU all is float32. The host waits for the device only before the second step, so that
compiling is not timed, where columns are counted, and at the end.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

import cce_numba.torch as cct
from benchmarks.data import text as texts
from benchmarks.peers import paper
from benchmarks.training import columns
from benchmarks.training.trainer import Criterion
from benchmarks.training.transformer import Size, Transformer
from benchmarks.training.ways import PAPER, Way

HEAD = 64  # dimensions of each head of attention
LEARNING_RATE, BETAS = 1e-3, (0.9, 0.95)
_WARM_UP, _LOWEST = 0.1, 0.1  # share of the steps in which the rate rises; what share of it is left at the end
_POINTS = 20  # of a curve
_VALIDATION_BATCHES = 8
_COLUMNS_AT = 0.0, 0.1, 0.5, 1.0  # shares of the steps


@dataclass(frozen=True)
class Course:
    """What all runs have in common: how many steps, the sequences of a step and their length, the model's size."""

    steps: int
    sequences: int
    length: int
    hidden: int
    layers: int

    @property
    def every(self) -> int:
        """So many steps lie between two points of a curve."""
        return max(1, self.steps // _POINTS)

    def size(self, vocabulary: int) -> Size:
        """The size of the model and its batch."""
        return Size(self.sequences, self.length, vocabulary, self.hidden, self.layers, heads=max(1, self.hidden // HEAD))

    def rate(self, step: int) -> float:
        """The learning rate of a step, from 0 on, as a share of the highest: it rises evenly, then falls as a cosine."""
        warm_up = max(1, round(_WARM_UP * self.steps))
        if step < warm_up:
            return (step + 1) / warm_up
        done = (step - warm_up) / max(1, self.steps - warm_up)
        return _LOWEST + (1 - _LOWEST) * (1 + math.cos(math.pi * done)) / 2


class Corpus:
    """The ids on the device, int64: `training` (tokens,), and `validation` (batches, sequences, length + 1), evenly spaced."""

    def __init__(self, ids: np.ndarray, course: Course, device: str) -> None:
        training, end = texts.split(ids)
        starts = np.linspace(0, len(end) - course.length - 1, _VALIDATION_BATCHES * course.sequences).astype(np.int64)
        windows = end[starts[:, None] + np.arange(course.length + 1)]
        self.training = torch.from_numpy(training).to(device)
        self.validation = torch.from_numpy(windows.reshape(_VALIDATION_BATCHES, course.sequences, -1)).to(device)


def dtype_on(device: str) -> torch.dtype:
    """Of embeddings and head, as the loss takes them."""
    return torch.bfloat16 if device == "cuda" else torch.float32


class Learner:
    """A model that a seed has initialised, its optimizer, and a way to take its gradients."""

    def __init__(self, size: Size, course: Course, way: Way, seed: int, device: str) -> None:
        torch.manual_seed(seed)
        with torch.device(device):
            self.model = Transformer(size, tied=False, positions=True)
            self.draws = torch.zeros((), dtype=torch.int64)  # the filter's seed: the number of the step
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, betas=BETAS, fused=True)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, course.rate)
        self.autocast = partial(torch.autocast, device, torch.bfloat16, enabled=device == "cuda")
        self.dtype = dtype_on(device)
        self.criterion = self._criterion(way)

    def step(self, batch: torch.Tensor) -> torch.Tensor:
        """Learns a batch (sequences, length + 1), and returns the loss before that."""
        loss = self.criterion(*self.operands(batch))
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.draws += 1
        return loss.detach()

    @torch.no_grad()
    def validated(self, batches: torch.Tensor) -> torch.Tensor:
        """The mean loss of batches, which no filter touches."""
        return torch.stack([cct.linear_cross_entropy(*self.operands(batch)) for batch in batches]).mean()

    @torch.no_grad()
    def columns(self, batch: torch.Tensor, way: Way) -> dict[str, float]:
        """What the filter keeps of a batch, see `columns.shares`."""
        e, c, targets = self.operands(batch)
        return columns.shares(e.flatten(0, -2), c, targets.flatten(), way, int(self.draws))

    def operands(self, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Embeddings, head and targets of a batch."""
        with self.autocast():
            e = self.model(batch[:, :-1])
        return e.to(self.dtype), self.model.head.to(self.dtype), batch[:, 1:]

    def _criterion(self, way: Way) -> Criterion:
        if way.name == PAPER:
            return paper.loss()
        return partial(cct.linear_cross_entropy, filter_seed=self.draws, **way.options)


def run(course: Course, corpus: Corpus, way: Way, vocabulary: int, seed: int) -> dict[str, Any]:
    """Takes the course in one way. The model's start and the batches follow from the seed alone.

    Returns `train`, the mean loss of each `course.every` steps; `validation`, pairs of steps taken and loss; `columns`, pairs
    of steps taken and shares of columns; and `seconds`, of all steps after the first, of validation and of counting columns.
    """
    device = corpus.training.device
    learner = Learner(course.size(vocabulary), course, way, seed, device.type)
    last_start = len(corpus.training) - course.length - 1
    starts = np.random.default_rng(seed).integers(last_start + 1, size=(course.steps, course.sequences))
    windows = torch.from_numpy(starts).to(device)[:, :, None] + torch.arange(course.length + 1, device=device)
    losses = torch.zeros(course.steps, device=device)
    validation: dict[int, torch.Tensor] = {}
    shares: list[tuple[int, dict[str, float]]] = []
    counted = {round(share * (course.steps - 1)) for share in _COLUMNS_AT}
    for step in range(course.steps):
        batch = corpus.training[windows[step]]
        if step in counted:
            shares.append((step, learner.columns(batch, way)))
        losses[step] = learner.step(batch)
        if step == 0:
            losses.tolist()  # waits
            began = time.perf_counter()
        if (taken := step + 1) % course.every == 0 or taken == course.steps:
            validation[taken] = learner.validated(corpus.validation)
    of_steps = losses.tolist()
    seconds = time.perf_counter() - began
    parts = [of_steps[i : i + course.every] for i in range(0, course.steps, course.every)]
    return {
        "train": [round(sum(part) / len(part), 5) for part in parts],
        "validation": [(taken, round(float(loss), 5)) for taken, loss in validation.items()],
        "columns": shares,
        "seconds": round(seconds, 2),
    }
