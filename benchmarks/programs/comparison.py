"""Loss and gradients against PyTorch's, over the 216 shapes of cu_cce's comparison test, and over ragged shapes that are ours.

    python -m benchmarks comparison                       216 shapes, and as many that are no multiples of tiles
    python -m benchmarks comparison --ragged              the ragged ones alone; --tiled: the others alone
    python -m benchmarks comparison --dtype bfloat16      16 bits, on tensor cores (default float32, as there)
    python -m benchmarks comparison --filter              with our default filter (default: exact gradients)
    python -m benchmarks comparison --quick               64 small shapes of each kind, on the CPU too

cu_cce (https://github.com/mnehete32/cu_cce) is the paper's loss in CUTLASS. Its comparison test takes all shapes in which
tokens, entries and hidden size are each one of 128, 256, 512, 1024, 2048 and 4096; e and c uniform in [0, 1); uniform targets.
It compares the mean loss and both gradients with PyTorch's from stored logits, by the largest absolute difference, 1e-4 at
most. This program takes the same shapes and distribution, and besides every size made ragged: one more or less than a multiple
of a tile.

An absolute difference says little here: no entry of dE is above 1 / N, which is 2.4e-4 for 4096 tokens. So errors are
relative, Frobenius norms of the difference over that of the truth, and the truth is PyTorch's own mathematics in float64.
PyTorch in the dtype of the inputs stands beside ours. Ours is wrong where its error is above 4 times PyTorch's and above 4
times finfo(dtype).eps. The table has cu_cce's largest absolute difference too.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional as F

import cce_numba.torch as cct
from benchmarks.data import Shape
from benchmarks.errors import Wrong
from benchmarks.proof.session import Session, add_options
from benchmarks.tables import comparison as tables

SIZES = (128, 256, 512, 1024, 2048, 4096)
RAGGED = (127, 257, 509, 1025, 2047, 4099)  # no multiple of a tile, of a vector load, or of a warp
QUICK_SIZES, QUICK_RAGGED = (128, 256, 384, 512), (1, 127, 257, 509)
SEED = 32
_TIMES_PYTORCH = 4  # errors of ours at most, in PyTorch's
_ROUNDINGS = 4  # and in units of finfo(dtype).eps, where PyTorch happens to be nearly exact


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The program's options."""
    add_options(parser, "64 small shapes of each kind")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--tiled", action="store_true", help="multiples of tiles alone")
    kind.add_argument("--ragged", action="store_true", help="ragged shapes alone")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of e and c")
    parser.add_argument("--filter", action="store_true", help="our default filter, where gradients are right on average only")


def run(arguments: argparse.Namespace) -> None:
    """Compares the shapes that the record lacks, shows all. Raises Wrong if one is wrong, after the others."""
    session = Session.of("comparison", arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    how = {"dtype": arguments.dtype, "filter": arguments.filter, "device": device}
    if session.name is None and how | {"dtype": "float32", "filter": False} != how:
        session.name = f"{session.record_name}_{arguments.dtype}{'_filter' if arguments.filter else ''}"
    book = session.book(how)
    shapes = list(shapes_of(arguments))
    left = [(kind, shape) for kind, shape in shapes if book.find(_key(kind, shape)) is None]
    with session.progress(len(shapes)) as steps:
        steps.done(len(shapes) - len(left))
        for kind, shape in left:
            if session.is_over:
                break
            steps.say(f"{kind}: {' x '.join(map(str, shape))}")
            book.put(_key(kind, shape), compared(shape, getattr(torch, arguments.dtype), device, exact=not arguments.filter))
            steps.done()
    results = book.results()
    for shown in tables.tables(results):
        session.console.print(shown)
    session.told(book, [], sum(book.find(_key(kind, shape)) is None for kind, shape in shapes))
    if wrong := [cell for cell in results["cells"] if cell["wrong"]]:
        raise Wrong(
            f"{len(wrong)} shapes; the first: N={wrong[0]['N']}, V={wrong[0]['V']}, D={wrong[0]['D']}: {wrong[0]['wrong']}"
        )


def shapes_of(arguments: argparse.Namespace) -> Iterator[tuple[str, Shape]]:
    """Kinds and shapes."""
    tiled, ragged = (QUICK_SIZES, QUICK_RAGGED) if arguments.quick else (SIZES, RAGGED)
    if not arguments.ragged:
        yield from (("tiled", shape) for shape in itertools.product(tiled, tiled, tiled))
    if not arguments.tiled:
        yield from (("ragged", shape) for shape in itertools.product(ragged, ragged, ragged))


def compared(shape: Shape, dtype: torch.dtype, device: str, *, exact: bool) -> dict[str, Any]:
    """Losses and errors of ours and of PyTorch, against PyTorch in float64 on the same inputs."""
    N, V, D = shape
    generator = torch.Generator(device).manual_seed(SEED)
    e, c = (torch.rand(rows, D, generator=generator, device=device).to(dtype) for rows in (N, V))
    targets = torch.randint(V, (N,), generator=generator, device=device)

    def ours(e: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return cct.linear_cross_entropy(e, c, targets, filter_eps=None if exact else "auto")

    def stored(e: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(e @ c.T, targets)

    truth = _differentiated(stored, e.double(), c.double())
    found = {"ours": _differentiated(ours, e, c), "pytorch": _differentiated(stored, e, c)}
    errors = {who: _errors(values, truth) for who, values in found.items()}
    absolute = {name: float((x - y).abs().max()) for name, x, y in zip(("e", "c"), found["ours"][1:], truth[1:], strict=True)}
    limits = {
        name: max(_TIMES_PYTORCH * error, _ROUNDINGS * torch.finfo(dtype).eps) for name, error in errors["pytorch"].items()
    }
    # A filtered gradient is right on average only, so its single errors say nothing; its loss is exact.
    judged = limits if exact else {"loss": limits["loss"]}
    wrong = [f"{name} {errors['ours'][name]:.2g}" for name, limit in judged.items() if not errors["ours"][name] <= limit]
    return {"loss": float(truth[0]), "errors": errors, "largest_difference": absolute, "wrong": ", ".join(wrong)}


def _differentiated(function: Any, e: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss and gradients."""
    e, c = (x.detach().clone().requires_grad_() for x in (e, c))
    loss = function(e, c)
    return (loss.detach(), *torch.autograd.grad(loss, (e, c)))


def _errors(found: tuple[torch.Tensor, ...], truth: tuple[torch.Tensor, ...]) -> dict[str, float]:
    """Relative to the truth's norm, and to 1 + the loss; a gradient that is zero as a whole must be met exactly."""
    names = "loss", "e", "c"
    norms = (1 + truth[0].abs(), truth[1].norm(), truth[2].norm())
    return {
        name: float((x.double() - y).norm() / norm) if norm > 0 else float((x != 0).any())
        for name, x, y, norm in zip(names, found, truth, norms, strict=True)
    }


def _key(kind: str, shape: Shape) -> dict[str, Any]:
    return {"kind": kind, **dict(zip("NVD", shape, strict=True))}
