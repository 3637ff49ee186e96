"""A model that learns text with one method's gradients, in pieces: it can be saved after any step and go on. Imports PyTorch.

Parameters and AdamW's state are float32. On a GPU the model runs under autocast in bfloat16, and the loss takes embeddings and
head rounded to bfloat16. On the CPU all is float32.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import cce_numba.torch as cct
from benchmarks.data import text as texts
from benchmarks.peers.methods import Criterion, Method

BETAS = (0.9, 0.95)
_WARM_UP, _LOWEST = 0.1, 0.1  # share of the steps in which the rate rises; what share of it is left at the end


@dataclass(frozen=True)
class Schooling:
    """What all runs of a study have in common.

    Attributes:
        steps: of the optimizer.
        sequences, length: of a step's batch.
        learning_rate: the highest; it rises evenly over a tenth of the steps, then falls as a cosine to a tenth of itself.
        points: of a curve.
        validation_batches: batches from the end of the text that give a validation loss.
    """

    steps: int
    sequences: int
    length: int
    learning_rate: float
    points: int = 50
    validation_batches: int = 8

    @property
    def every(self) -> int:
        """So many steps lie between two points of a curve."""
        return max(1, self.steps // self.points)

    def rate(self, step: int) -> float:
        """The learning rate of a step, as a share of the highest."""
        warm_up = max(1, round(_WARM_UP * self.steps))
        if step < warm_up:
            return (step + 1) / warm_up
        done = (step - warm_up) / max(1, self.steps - warm_up)
        return _LOWEST + (1 - _LOWEST) * (1 + math.cos(math.pi * done)) / 2


class Batches:
    """A text's windows on a device, of int64: (sequences, length + 1) each."""

    def __init__(self, ids: np.ndarray, schooling: Schooling, device: str) -> None:
        training, end = texts.split(ids)
        count = schooling.validation_batches * schooling.sequences
        starts = np.linspace(0, len(end) - schooling.length - 1, count).astype(np.int64)
        windows = end[starts[:, None] + np.arange(schooling.length + 1)]
        self.schooling = schooling
        self.training = torch.from_numpy(training).to(device)
        self.validation = torch.from_numpy(windows.reshape(schooling.validation_batches, schooling.sequences, -1)).to(device)

    def of_seed(self, seed: int) -> Callable[[int], torch.Tensor]:
        """The batch of each step, which the seed alone decides."""
        schooling, device = self.schooling, self.training.device
        last = len(self.training) - schooling.length - 1
        starts = np.random.default_rng(seed).integers(last + 1, size=(schooling.steps, schooling.sequences))
        offsets = torch.arange(schooling.length + 1, device=device)
        return lambda step: self.training[torch.from_numpy(starts[step]).to(device)[:, None] + offsets]


class Trainee:
    """A model on its way, its optimizer, and what has been seen of its losses.

    `model` takes tokens (sequences, length) to embeddings (sequences, length, D), and its attribute `head` is the (V, D)
    classifier.
    """

    def __init__(self, model: torch.nn.Module, schooling: Schooling, method: Method) -> None:
        self.model, self.schooling = model, schooling
        device = next(model.parameters()).device
        self.draws = torch.zeros((), dtype=torch.int64, device=device)  # the filter's seed: the number of the step
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=schooling.learning_rate, betas=BETAS, fused=True)
        self.autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=device.type == "cuda")
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        criterion: Any = method.make()
        self.criterion: Criterion = partial(criterion, filter_seed=self.draws) if method.is_ours else criterion
        self.step = 0
        self.losses = torch.zeros(schooling.steps, device=device)
        self.validation: list[tuple[int, float]] = []
        self.seconds = 0.0

    def learn(self, batches: Batches, seed: int, stop: Callable[[], bool], done: Callable[[], None]) -> bool:
        """Takes steps until all are taken, or `stop()` after a validation; `done()` is called at each validation.

        Returns whether all steps are taken.
        """
        batch_of, schooling = batches.of_seed(seed), self.schooling
        began = time.perf_counter()
        while self.step < schooling.steps:
            self._take(batch_of(self.step))
            if self.step % schooling.every == 0 or self.step == schooling.steps:
                self.validation.append((self.step, round(self._validated(batches.validation), 5)))  # waits
                done()
                if self.step < schooling.steps and stop():
                    break
        self.seconds += time.perf_counter() - began
        return self.step == schooling.steps

    def found(self) -> dict[str, Any]:
        """`train`, pairs of a step and the mean loss of the steps up to it; `validation`, pairs too; and `seconds`."""
        losses, every = self.losses.tolist(), self.schooling.every
        ends = [step for step, _ in self.validation]
        train = [(end, round(float(np.mean(losses[max(0, end - every) : end])), 5)) for end in ends]
        return {"train": train, "validation": self.validation, "seconds": round(self.seconds, 1)}

    def save(self, path: Path) -> None:
        """Writes all that is needed to go on, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(".new")
        state = {
            "schooling": asdict(self.schooling),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "losses": self.losses,
            "validation": self.validation,
            "step": self.step,
            "seconds": self.seconds,
        }
        torch.save(state, new)
        new.replace(path)

    def restore(self, path: Path) -> bool:
        """Goes on from a file that `save` wrote. False, and nothing happens, if there is none or it is of another schooling."""
        if not path.exists():
            return False
        state = torch.load(path, map_location=self.losses.device, weights_only=True)
        if state["schooling"] != asdict(self.schooling):
            return False
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.losses.copy_(state["losses"])
        self.validation = [tuple(point) for point in state["validation"]]
        self.step, self.seconds = state["step"], state["seconds"]
        self.draws.fill_(self.step)
        return True

    def _take(self, batch: torch.Tensor) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.schooling.learning_rate * self.schooling.rate(self.step)
        loss = self.criterion(*self._operands(batch))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses[self.step] = loss.detach()
        self.step += 1
        self.draws += 1

    @torch.no_grad()
    def _validated(self, batches: torch.Tensor) -> float:
        """The mean loss of batches by our forward, which is exact, whatever method is learned with."""
        return float(torch.stack([cct.linear_cross_entropy(*self._operands(batch)) for batch in batches]).mean())

    def _operands(self, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        with self.autocast():
            e = self.model(batch[:, :-1])
        head: torch.Tensor = self.model.head
        return e.to(self.dtype), head.to(self.dtype), batch[:, 1:]
