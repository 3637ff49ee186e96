"""What PyTorch's autograd adds to a call (bfloat16): `cce_numba.torch`'s loss and its `.backward()` against the direct call.

    python -m benchmarks autograd --record training_h100
    python -m benchmarks autograd --small                    small shapes: does it run?

The direct call is `linear_cross_entropy_with_grad` on the same tensors; both take PyTorch's memory, and they are timed in
turns. Autograd may take 3 % or 100 us more than the direct call, of the device and of the host. The host's time is that
until a call returns when nothing is queued; where it is longer than the device's, the time in turns is the host's. Inputs
are as sparse as those of a real model (data/calibrated.py). Memory is PyTorch's peak during a call, less what was allocated
before and the gradients. Baselines store the logits: `F.cross_entropy((e @ c.T).float(), targets)`, as it stands and under
`torch.compile`.
"""

from __future__ import annotations

import argparse
import traceback
from typing import Any

import numpy as np
import torch
from rich.console import Console

import cce_numba as cce
import cce_numba.torch as cct
from benchmarks import options
from benchmarks.data import Shape, calibrated
from benchmarks.errors import CannotRun, Wrong
from benchmarks.measure import device, memory, record, timing
from benchmarks.options import Pace
from benchmarks.peers import stored_logits as peer
from benchmarks.tables import autograd as tables
from benchmarks.tables.autograd import COMPILED_LOSS, DIRECT, OURS, STORED
from benchmarks.tables.cells import shape as shown_shape
from benchmarks.training.trainer import Criterion
from cce_numba.torch.memory import from_pytorch

SHAPES: tuple[Shape, ...] = ((8192, 131_072, 2048), (512, 32_768, 1024))
SMALL_SHAPES: tuple[Shape, ...] = ((512, 8192, 256),)
_MORE, _MORE_MS = 0.03, 0.1  # autograd may add this share of the direct call's time, or so many ms: the larger of both
# Relative errors at most, of the loss and of the gradients, against the direct call. Ours are the same kernels. Stored logits
# are rounded to bfloat16, by up to 0.06 at 16, and so are e's and c's shares of a gradient.
_ERRORS = {OURS: 1e-3, STORED: 0.1, COMPILED_LOSS: 0.1}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The program's options."""
    parser.add_argument("--small", action="store_true", help="small shapes alone")
    options.add_pace(parser)
    options.add_record(parser)


def run(arguments: argparse.Namespace) -> None:
    """Measures, shows, records. Raises Wrong if a loss was wrong; the other shapes are measured nevertheless."""
    require_torch()
    pace = Pace(arguments.rounds, arguments.burst, warm_up_s=0.1 if arguments.small else Pace.warm_up_s)
    console = Console(width=180)
    results: dict[str, Any] = {"how": {"rounds": pace.rounds, "burst": pace.burst}, "calls": []}
    try:
        for shape in SMALL_SHAPES if arguments.small else SHAPES:
            with console.status(f"{shape}"):
                results["calls"].append(measured(shape, pace))
            console.print(tables.one_line(results["calls"][-1]))
    finally:  # what was measured before something broke was measured
        console.print(tables.call_table(results["calls"]), tables.memory_table(results["calls"]))
        if arguments.record:
            console.print(str(record.write(arguments.record, results)))
    if wrong := [shown_shape(call) for call in results["calls"] if "wrong" in call]:
        raise Wrong(f"not timed: {'; '.join(wrong)}")


def require_torch() -> None:
    """Raises CannotRun where PyTorch has no GPU."""
    device.require()
    if device.torch_with_cuda() is None:
        raise CannotRun("this PyTorch finds no GPU: it needs one with CUDA")


def measured(shape: Shape, pace: Pace) -> dict[str, Any]:
    """All that is measured of one shape."""
    tensors = made(shape)
    e, c, targets = tensors
    found: dict[str, Any] = dict(zip("NVD", shape, strict=True))
    found["backend"] = cce.explain(e.detach(), c.detach(), targets).backend

    def direct() -> Any:
        return cce.linear_cross_entropy_with_grad(e.detach(), c.detach(), targets)

    criteria = {OURS: cct.linear_cross_entropy, STORED: peer.stored_logits, COMPILED_LOSS: peer.compiled(peer.stored_logits)}
    with from_pytorch(e.device):
        expected = direct()
        found["losses"] = {name: validated(name, criterion, tensors, expected) for name, criterion in criteria.items()}
        del expected
        if wrong := [f"{name}: {of['wrong']}" for name, of in found["losses"].items() if "wrong" in of]:
            return found | {"wrong": "; ".join(wrong)}
        e.grad = c.grad = None
        calls = {DIRECT: direct, OURS: lambda: with_backward(cct.linear_cross_entropy, *tensors)}
        timing.warm_up(calls.values(), pace.warm_up_s)
        ms = timing.interleaved(calls, pace.rounds, pace.burst)
        host_ms = {name: timing.host_ms(call) for name, call in calls.items()}
    return found | {"device": compared(ms), "host": compared(host_ms)}


def made(shape: Shape) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`(e, c, targets)` in PyTorch's memory; CuPy's is given back."""
    e, c, targets = (device.as_torch(array).clone() for array in calibrated.make(*shape, device.cupy()))
    device.free_memory()
    return e.requires_grad_(), c.requires_grad_(), targets


def with_backward(criterion: Criterion, e: torch.Tensor, c: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The loss; its gradients take the place of e's and c's gradients."""
    e.grad = c.grad = None
    loss = criterion(e, c, targets)
    loss.backward()
    return loss.detach()


def validated(name: str, criterion: Criterion, tensors: tuple[torch.Tensor, ...], expected: Any) -> dict[str, Any]:
    """Errors against the direct call, and extra memory; or that it does not fit, or what is wrong."""
    e, c, _ = tensors
    loss, gradients = expected
    try:
        value = with_backward(criterion, *tensors)
        errors = {"loss": error(value, loss), "e": error(e.grad, gradients.e), "c": error(c.grad, gradients.c)}
        e.grad = c.grad = None
        with memory.torch_peak() as peak:
            with_backward(criterion, *tensors)
    except torch.OutOfMemoryError:
        return {"does_not_fit": True}
    except Exception as problem:  # a compiler's, perhaps; there is more to be measured
        traceback.print_exc()
        return {"wrong": f"{type(problem).__name__}: {problem}"}
    finally:
        e.grad = c.grad = None
    found = {"errors": errors, "extra_bytes": peak.bytes - e.nbytes - c.nbytes}
    off = [f"{of} is off by {value:.3g}" for of, value in errors.items() if not value <= _ERRORS[name]]  # NaN is off as well
    return found | ({"wrong": ", ".join(off)} if off else {})


def error(found: Any, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def compared(ms: dict[str, list[float]]) -> dict[str, Any]:
    """Both times, what autograd adds in a round, and what it may add."""
    allowed = max(_MORE * float(np.median(ms[DIRECT])), _MORE_MS)
    more = timing.spread(np.subtract(ms[OURS], ms[DIRECT]), digits=4)
    return {name: record.summary(times) for name, times in ms.items()} | {"more_ms": more, "more_ms_at_most": round(allowed, 4)}
