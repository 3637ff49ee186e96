"""Inputs of a language model's size, in bfloat16, made by NumPy or CuPy.

random      logits are normal, targets have nothing to do with them: nearly every entry survives the filter
real        an archive of a real last layer, extended to the shape that is wanted
calibrated  made up to be as sparse as a real model with a vocabulary of 256 000; `sparsity` measures that
archive     reading an archive, which is not trusted (`cce_numba/commands/npz.py`)

`text` is apart from these: token ids, of a file or drawn, for a language model to learn.
"""

from __future__ import annotations

from typing import Any, NamedTuple

Shape = tuple[int, int, int]  # N, V, D


class Inputs(NamedTuple):
    """A problem: e (N, D) and c (V, D) in bfloat16, targets (N,) int64 in [0, V)."""

    e: Any
    c: Any
    targets: Any

    @property
    def shape(self) -> Shape:
        """N, V and D."""
        return len(self.e), len(self.c), self.e.shape[1]
