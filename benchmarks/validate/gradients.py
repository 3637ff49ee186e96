"""What gradients must be: float32 mathematics on the same bfloat16 inputs, by stored logits of some tokens at a time.

CuPy multiplies float32 without tf32 unless CUPY_TF32=1 is set, which `compute` refuses: tf32 would round as bfloat16 nearly
does.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.data import Inputs
from cce_numba.interchange import BFLOAT16, array_module

_LOGITS = 2**28  # logits that are stored at a time: 1 GiB
_ROWS = 8192  # rows of a gradient that are compared at a time


@dataclass(frozen=True)
class ExactGradients:
    """Mean loss and its gradients; `gradients` and `rounding` are by name, "e" and "c".

    Attributes:
        loss: mean over the tokens, in nats.
        gradients: (N, D) and (V, D) float32.
        rounding: error of the exact gradient rounded to bfloat16, which no bfloat16 gradient can be expected to beat.
    """

    loss: float
    gradients: dict[str, Any]
    rounding: dict[str, float]


def compute(inputs: Inputs) -> ExactGradients:
    """Loss and gradients, all of whose tokens must count.

    Beyond inputs and gradients it takes c and dC once more in float32, and the logits of some tokens.
    """
    e, c, targets = inputs
    if os.environ.get("CUPY_TF32", "0") != "0":
        raise RuntimeError("CUPY_TF32 is set: these products would be no better than those that they are to judge")
    xp = array_module(e)
    N, V = len(e), len(c)
    rows, entries = e.astype(np.float32), c.astype(np.float32)
    d_e, d_c = xp.empty_like(rows), xp.zeros_like(entries)
    nll = xp.empty(N, np.float32)
    step = max(1, _LOGITS // V)
    for start in range(0, N, step):
        here = slice(start, min(start + step, N))
        of_targets = xp.arange(here.stop - start), targets[here]
        g = rows[here] @ entries.T
        g -= g.max(axis=1, keepdims=True)
        target_logit = g[of_targets]
        xp.exp(g, out=g)
        total = g.sum(axis=1, keepdims=True)
        nll[here] = xp.log(total[:, 0]) - target_logit
        g /= total
        g[of_targets] -= 1
        g /= N
        d_e[here] = g @ entries
        d_c += g.T @ rows[here]
    gradients = {"e": d_e, "c": d_c}
    rounding = {name: error(gradient.astype(BFLOAT16), gradient) for name, gradient in gradients.items()}
    return ExactGradients(float(nll.mean(dtype=np.float64)), gradients, rounding)


def error(found: Any, exact: Any) -> float:
    """Relative Frobenius norm of the difference; NaN if anything is NaN."""
    xp = array_module(exact)
    of_difference = of_exact = 0.0
    for part in _parts(exact):
        of_difference += float(xp.square(found[part].astype(np.float32) - exact[part]).sum(dtype=np.float64))
        of_exact += float(xp.square(exact[part]).sum(dtype=np.float64))
    return (of_difference / of_exact) ** 0.5


def zero_rows(gradient: Any) -> float:
    """The share of the rows that are zero as a whole."""
    some = sum(int(gradient[part].astype(np.float32).any(axis=1).sum()) for part in _parts(gradient))
    return 1 - some / len(gradient)


def _parts(array: Any) -> Iterator[slice]:
    return (slice(start, start + _ROWS) for start in range(0, len(array), _ROWS))
