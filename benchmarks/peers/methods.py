"""All ways to the loss that are compared: ours with its options, and the packages of others. Imports PyTorch.

A method makes its criterion, a function of e (..., D), c (V, D) and targets (...), that returns the mean loss of the tokens
whose target is not -100, recorded by autograd. A package that is not installed, or that needs a GPU that is not there, is
named by `why_none`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

import cce_numba.torch as cct
from benchmarks.peers.stored_logits import compiled, stored_logits

Criterion = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

OURS, PAPER, LIGER, QUACK, TORCH = "cce_numba", "cut_cross_entropy", "liger_kernel", "quack", "torch"


@dataclass(frozen=True)
class Method:
    """A way to the loss and its gradients.

    Attributes:
        name: as tables have it.
        package: whose it is.
        make: makes the criterion; may raise what importing a package raises.
        on_cpu: whether it runs without a GPU.
        wrt: the gradients that it is to compute, of "e" and "c".
        in_forward: whether the forward of a loss with gradients computes the gradients too, and the backward only scales them.
        capability: the only GPU that it is for, as (major, minor), or None.
    """

    name: str
    package: str
    make: Callable[[], Criterion]
    on_cpu: bool = False
    wrt: tuple[str, ...] = ("e", "c")
    in_forward: bool = False
    capability: tuple[int, int] | None = None

    @property
    def is_ours(self) -> bool:
        """Whether it is this project's."""
        return self.package == OURS

    def why_none(self, device: str) -> str | None:
        """Why it cannot run on a device of this type, or None if nothing is known against it."""
        try:
            importlib.import_module(self.package)
        except Exception as error:  # a package that is installed may fail in many ways without its GPU
            return f"not installed: {error}" if isinstance(error, ModuleNotFoundError) else f"cannot be imported: {error!r}"
        if device == "cpu":
            return None if self.on_cpu else "its kernels need a GPU"
        if self.capability and torch.cuda.get_device_capability() != self.capability:
            return f"is for GPUs of compute capability {'.'.join(map(str, self.capability))} alone"
        return None


def _ours(**options: Any) -> Callable[[], Criterion]:
    return lambda: partial(cct.linear_cross_entropy, **options)


def _paper(impl: str) -> Callable[[], Criterion]:
    def make() -> Criterion:
        return partial(importlib.import_module(PAPER).linear_cross_entropy, impl=impl)

    return make


def _liger(**options: Any) -> Callable[[], Criterion]:
    def make() -> Criterion:
        function = importlib.import_module("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy

        def criterion(e: torch.Tensor, c: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return function(e.flatten(0, -2), c, targets.flatten(), **options)

        return criterion

    return make


def _liger_scaled() -> Criterion:
    module = importlib.import_module("liger_kernel.ops.fused_linear_scaled_cross_entropy")

    def criterion(e: torch.Tensor, c: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        found = module.LigerFusedLinearScaledCrossEntropyFunction.apply(e.flatten(0, -2), c, targets.flatten())
        nll = found if isinstance(found, torch.Tensor) else found[0]
        return nll.sum() / (targets != -100).sum()

    return criterion


def _quack(**options: Any) -> Callable[[], Criterion]:
    def make() -> Criterion:
        function = importlib.import_module("quack.linear_cross_entropy").chunked_linear_cross_entropy

        def criterion(e: torch.Tensor, c: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return function(e.flatten(0, -2), c, targets.flatten(), **options)

        return criterion

    return make


def _torch_fused(chunked: bool) -> Callable[[], Criterion]:
    def make() -> Criterion:
        function = getattr(F, "linear_cross_entropy", None)
        if function is None:
            raise NotImplementedError(f"torch {torch.__version__} has no F.linear_cross_entropy")
        options = {"options": torch.nn.LinearCrossEntropyOptions()} if chunked else {}

        def criterion(e: torch.Tensor, c: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return function(e.flatten(0, -2), c, targets.flatten(), **options)

        return criterion

    return make


METHODS = (
    Method("cce_numba", OURS, _ours(), on_cpu=True),
    Method("cce_numba, drop", OURS, _ours(filter="drop"), on_cpu=True),
    Method("cce_numba, exact dC", OURS, _ours(filter_c_grad=False), on_cpu=True),
    Method("cce_numba, exact", OURS, _ours(filter_eps=None), on_cpu=True),
    Method("cce_numba, frozen classifier", OURS, _ours(), on_cpu=True, wrt=("e",)),
    Method("torch.compile", TORCH, lambda: compiled(stored_logits), on_cpu=True),
    Method("cut_cross_entropy", PAPER, _paper("cce")),
    Method("Liger FLCE", LIGER, _liger(), in_forward=True),
    Method("Liger scaled CE, sm_90", LIGER, _liger_scaled, capability=(9, 0)),
    Method("quack, scaled exp", QUACK, _quack(use_scaled_exp=True), in_forward=True, capability=(9, 0)),
    Method("quack, chunked", QUACK, _quack(use_scaled_exp=False), in_forward=True),
    Method("PyTorch eager", TORCH, lambda: stored_logits, on_cpu=True),
    Method("F.linear_cross_entropy, chunked", TORCH, _torch_fused(chunked=True), on_cpu=True, in_forward=True),
    Method("F.linear_cross_entropy", TORCH, _torch_fused(chunked=False), on_cpu=True),
    Method("cut_cross_entropy, kahan_full_c", PAPER, _paper("cce_kahan_full_c")),
    Method("cut_cross_entropy, exact", PAPER, _paper("cce_exact")),
    Method("Liger FLCE, float32 sums", LIGER, _liger(accum_dtype=torch.float32), in_forward=True),
)
BY_NAME = {method.name: method for method in METHODS}
