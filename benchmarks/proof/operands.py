"""The tensors of a problem of `table1`, and what float32 mathematics makes of them. Imports PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.data import Inputs, Shape, calibrated, real
from benchmarks.data.archive import Archive
from benchmarks.measure import device as gpu
from benchmarks.proof.problems import Problem
from benchmarks.validate import gradients as truth
from benchmarks.validate.gradients import ExactGradients
from cce_numba.interchange import BFLOAT16, take

IGNORED = -100


@dataclass(frozen=True)
class Operands:
    """A problem as autograd takes it.

    Attributes:
        data: where the numbers come from.
        e, c: (N, D) and (V, D), which require gradients; bfloat16, on the CPU the same numbers in float32.
        targets: (N,) int64, `IGNORED` where a token takes no part.
        exact: mean loss and gradients, of e for the tokens that count alone.
    """

    data: str
    e: torch.Tensor
    c: torch.Tensor
    targets: torch.Tensor
    exact: ExactGradients

    def leaves(self, wrt: tuple[str, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """e and c, detached where `wrt` does not name them."""
        return (self.e if "e" in wrt else self.e.detach()), (self.c if "c" in wrt else self.c.detach())

    def drop_gradients(self) -> None:
        """Forgets the gradients that a backward has left."""
        self.e.grad = self.c.grad = None

    def gradient_bytes(self, wrt: tuple[str, ...]) -> int:
        """Of the gradients that are asked for, in the inputs' dtype."""
        return sum(x.numel() * x.element_size() for name, x in (("e", self.e), ("c", self.c)) if name in wrt)


def make(problem: Problem, archive: Archive | None, device: str) -> Operands:
    """The problem out of the archive, or calibrated to be as sparse as a real model where the archive does not fit it."""
    xp = gpu.cupy() if device == "cuda" else np
    inputs, data = _inputs(problem.shape, archive, xp)
    N = problem.shape[0]
    ignored = np.sort(np.random.default_rng(0).permutation(N)[: round(problem.ignored * N)])
    counting = inputs
    if len(ignored):
        counted = xp.asarray(np.setdiff1d(np.arange(N), ignored))
        counting = Inputs(inputs.e.view(np.uint16)[counted].view(BFLOAT16), inputs.c, inputs.targets[counted])
    exact = truth.compute(counting)
    e, c, targets = (tensor_of(x) for x in inputs)
    if device == "cpu":  # where PyTorch multiplies bfloat16 a hundred times more slowly
        e, c = e.float(), c.float()
    targets = targets.clone()
    targets[torch.from_numpy(ignored).to(targets.device)] = IGNORED
    free(device)
    return Operands(data, e.requires_grad_(), c.requires_grad_(), targets, exact)


def tensor_of(array: Any) -> torch.Tensor:
    """A tensor on the memory of a NumPy or CuPy array of bfloat16 or int64."""
    if not isinstance(array, np.ndarray):
        return gpu.as_torch(array)
    return torch.from_numpy(array) if array.dtype.kind == "i" else torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)


def array_of(tensor: torch.Tensor) -> Any:
    """The NumPy or CuPy array on a tensor's memory."""
    return take("tensor", tensor.detach())


def free(device: str) -> None:
    """Gives back to the driver what pools keep for later, so that each library may take it."""
    if device == "cuda":
        gpu.free_memory()
        torch.cuda.empty_cache()


def _inputs(shape: Shape, archive: Archive | None, xp: Any) -> tuple[Inputs, str]:
    if archive is not None and archive.why_not(*shape[1:]) is None:
        return real.make(archive, *shape, xp), f"real ({archive.name})"
    return calibrated.make(*shape, xp), "calibrated"
