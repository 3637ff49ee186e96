"""One method on one problem: whether it is right, and the most memory that it takes. Imports PyTorch."""

from __future__ import annotations

import math
import traceback
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.measure.memory import peak_of
from benchmarks.peers.methods import Criterion, Method
from benchmarks.proof.operands import Operands, array_of, free
from benchmarks.validate import gradients as truth

OK, MISSING, FAILED, WRONG = "ok", "missing", "failed", "wrong"
LOSS_ERROR, GRADIENT_ERROR = (
    1e-2,
    0.1,
)  # more, relative to 1 + loss and to the gradient, is what no rounding and no filter makes


@dataclass(frozen=True)
class Ready:
    """A method that was right, and its criterion, which has been called and has nothing left to compile."""

    method: Method
    criterion: Criterion

    def loss(self, operands: Operands) -> torch.Tensor:
        """The loss, with nothing kept for a backward."""
        with torch.no_grad():
            return self.criterion(operands.e.detach(), operands.c.detach(), operands.targets)

    def recorded(self, operands: Operands) -> torch.Tensor:
        """The loss as autograd records it."""
        return self.criterion(*operands.leaves(self.method.wrt), operands.targets)


def prepared(method: Method, operands: Operands) -> tuple[dict[str, Any], Ready | None]:
    """What there is to tell of the method before it is timed, and the method itself if it was right.

    Where a method is missing, fails or is wrong, `status` and `why` say so; the others go on.
    """
    device = operands.e.device.type
    if reason := method.why_none(device):
        return {"status": MISSING, "why": reason}, None
    try:
        ready = Ready(method, method.make())
        found = _validated(ready, operands)
        if "status" not in found:
            found |= {"status": OK, "memory": _memory(ready, operands)}
        return found, ready if found["status"] == OK else None
    except Exception as error:  # of a peer, whatever it raises; the other methods may be right
        if not isinstance(error, torch.cuda.OutOfMemoryError):
            traceback.print_exc()
        return {"status": FAILED, "why": f"{type(error).__name__}: {error}".splitlines()[0][:300]}, None
    finally:
        operands.drop_gradients()
        free(device)


def _validated(ready: Ready, operands: Operands) -> dict[str, Any]:
    """Loss and errors; `status` and `why` where they are more than rounding and a filter explain."""
    exact, wrt = operands.exact, ready.method.wrt
    loss = ready.recorded(operands)
    loss.backward()
    losses = float(loss.detach()), float(ready.loss(operands))
    errors: dict[str, float] = {"loss": max(abs(each - exact.loss) for each in losses)}
    wrong = []
    if not errors["loss"] <= LOSS_ERROR * (1 + abs(exact.loss)):  # so written, NaN is wrong as well
        wrong.append(f"the loss is {losses[0]:.5f} with gradients and {losses[1]:.5f} without, not {exact.loss:.5f}")
    for name in wrt:
        gradient = operands.e.grad if name == "e" else operands.c.grad
        assert gradient is not None
        if name == "c":
            errors["zero_rows"] = truth.zero_rows(array_of(gradient))
        elif bool((ignored := operands.targets < 0).any()):
            if bool(gradient[ignored].any()):
                wrong.append("an ignored token has a gradient")
            gradient = gradient[~ignored]
        errors[name] = truth.error(array_of(gradient), exact.gradients[name])
        if not errors[name] <= GRADIENT_ERROR:
            wrong.append(f"the error of d{name.upper()} is {errors[name]:.3g}")
    found_errors = {name: error if math.isfinite(error) else None for name, error in errors.items()}
    return {"loss": round(losses[0], 6), "errors": found_errors} | ({"status": WRONG, "why": "; ".join(wrong)} if wrong else {})


def _memory(ready: Ready, operands: Operands) -> dict[str, int | None]:
    """Peak bytes beyond the inputs: of the loss alone, and of loss and gradients, the gradients included."""
    operands.drop_gradients()
    device = operands.e.device.type
    with peak_of(device) as of_loss:
        ready.loss(operands)
    with peak_of(device) as of_both:
        ready.recorded(operands).backward()
    return {"loss": of_loss.bytes, "both": of_both.bytes, "gradients": operands.gradient_bytes(ready.method.wrt)}
