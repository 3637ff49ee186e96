"""The share of a vocabulary's columns that a filter keeps, of a block of tokens. Imports PyTorch."""

from __future__ import annotations

import torch

import cce_numba as cce
from benchmarks.training.ways import PAPER, Way
from cce_numba.survivors import SURVIVOR_BLOCK


def shares(e: torch.Tensor, c: torch.Tensor, targets: torch.Tensor, way: Way, seed: int) -> dict[str, float]:
    """The mean over blocks of 128 tokens of what the rule keeps, and of what our forward flags. Waits for the device.

    e: (N, D). c: (V, D). targets: (N,). `kept` follows from the exact probabilities; of draws it is the mean. `flagged` is what
    the backward computes again, from lower bounds of the log-sum-exp; what is computed densely may be more. There are none of
    `paper`, which drops tiles instead of columns.
    """
    if way.name == PAPER:
        return {}
    if way.eps is None:
        return {"kept": 1.0, "flagged": 1.0}
    counts = cce.forward(e, c, targets, filter_seed=seed, **way.options).survivor_counts()
    rows, kept = c.float(), []
    for block, own in zip(e.split(SURVIVOR_BLOCK), targets.split(SURVIVOR_BLOCK), strict=True):
        largest = (block.float() @ rows.T).softmax(-1).amax(0)
        chance = (largest / way.eps).clamp(max=1) if way.filter == "unbiased" else (largest >= way.eps).float()
        kept.append(chance.index_fill(0, own, 1.0).mean())
    return {"kept": float(torch.stack(kept).mean()), "flagged": float(counts.mean()) / len(c)}
