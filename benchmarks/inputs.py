"""Inputs of a language model's size, in bfloat16: random ones, and ones made of an archive of a real model's last layer.

An archive (see `make_demo_file`) is smaller than the shapes to be measured, so it is extended. Tokens are repeated; the hidden
size is lifted by a random orthonormal map, which leaves logits as they are; entries past the vocabulary are copies of it, each
copy 3 nats less likely than the one before. For larger vocabularies gain rare entries: copies as likely as the first would
raise every loss by the log of their number, and a block's survivors nearly threefold at V=256000. As it is, 10 % of those
columns survive 2^-16; with a real model of that size, 7 % do. Apart from survivors, the values matter for power alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import make_demo_file
import numpy as np

from cce_numba.interchange import BFLOAT16

NATS_PER_COPY = 3.0
_ROWS = 8192  # made at a time
_SPREAD = 2.0  # standard deviation of random logits


@dataclass(frozen=True)
class Archive:
    """A real last layer in float32: e (tokens, size), c (vocabulary, size), targets (tokens,)."""

    name: str
    e: np.ndarray
    c: np.ndarray
    targets: np.ndarray

    def why_not(self, V: int, D: int) -> str | None:
        """Why it cannot be extended to a shape, or None if it can."""
        vocabulary, size = self.c.shape
        return None if vocabulary <= V and size <= D else f"V must be at least {vocabulary} and D at least {size}"


def read(path: str) -> Archive:
    """Raises ValueError for a file of another kind, OSError if it cannot be read."""
    arrays = make_demo_file.demo_arrays(path, None, "float32")
    return Archive(Path(path).name, arrays["e"], arrays["c"], arrays["targets"])


def random(N: int, V: int, D: int, xp: Any) -> tuple[Any, Any, Any]:
    """`(e, c, targets)`: logits are normal, targets have nothing to do with them."""
    rng = xp.random.default_rng(0)

    def normal(start: int, stop: int) -> Any:
        return rng.standard_normal((stop - start, D), dtype=np.float32)

    scale = np.float32(_SPREAD / D**0.5)
    e, c = by_rows(N, D, normal, xp), by_rows(V, D, lambda start, stop: normal(start, stop) * scale, xp)
    return e, c, rng.integers(0, V, N)


def real(archive: Archive, N: int, V: int, D: int, xp: Any) -> tuple[Any, Any, Any]:
    """`(e, c, targets)` of the archive, extended."""
    e, c, targets = (xp.asarray(x) for x in (archive.e, archive.c, archive.targets))
    normal = np.random.default_rng(0).standard_normal((D, c.shape[1]), dtype=np.float32)
    lift = xp.asarray(np.linalg.qr(normal)[0].T)
    mean = e.mean(axis=0)
    one_nat = mean / (mean @ mean)  # less of it in a row of c lowers that entry's mean logit by 1

    def tokens(start: int, stop: int) -> Any:
        return e[xp.arange(start, stop) % len(e)] @ lift

    def entries(start: int, stop: int) -> Any:
        v = xp.arange(start, stop)
        nats = (v // len(c)).astype(np.float32) * np.float32(NATS_PER_COPY)
        return (c[v % len(c)] - nats[:, None] * one_nat) @ lift

    all_targets = targets[xp.arange(N) % len(targets)].astype(np.int64)
    return by_rows(N, D, tokens, xp), by_rows(V, D, entries, xp), all_targets


def by_rows(rows: int, D: int, make: Callable[[int, int], Any], xp: Any) -> Any:
    """(rows, D) bfloat16, out of float32 that is never there as a whole."""
    out = xp.empty((rows, D), BFLOAT16)
    for start in range(0, rows, _ROWS):
        stop = min(start + _ROWS, rows)
        out[start:stop] = make(start, stop).astype(BFLOAT16)
    return out
