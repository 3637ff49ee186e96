"""Random inputs. Their softmax is peaked on the wrong entries, so nearly every column survives the filter."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.data import Inputs
from benchmarks.data.rows import by_rows

_SPREAD = 2.0  # standard deviation of the logits


def make(N: int, V: int, D: int, xp: Any) -> Inputs:
    """Inputs whose logits are normal and whose targets are uniform; the seed is always 0."""
    rng = xp.random.default_rng(0)

    def normal(start: int, stop: int) -> Any:
        return rng.standard_normal((stop - start, D), dtype=np.float32)

    scale = np.float32(_SPREAD / D**0.5)
    e, c = by_rows(N, D, normal, xp), by_rows(V, D, lambda start, stop: normal(start, stop) * scale, xp)
    return Inputs(e, c, rng.integers(0, V, N))
