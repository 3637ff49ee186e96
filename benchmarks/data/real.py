"""Inputs made of an archive of a real model's last layer, extended to the shape that is wanted.

An archive is smaller than the shapes to be measured. Its tokens are repeated. Its hidden size is lifted by a random
orthonormal map, which leaves the logits as they are. Entries past its vocabulary are copies of its entries, each copy 3
nats less likely than the one before, because a larger vocabulary gains rare entries. Copies as likely as the first would
raise every loss by the log of their number, and would nearly triple a block's survivors at V=256000. Extended as it is,
10 % of those columns survive 2^-16; with a real model of that size, 7 % do. Apart from the survivors, the values matter for
power alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.data import Inputs
from benchmarks.data.archive import Archive
from benchmarks.data.rows import by_rows

NATS_PER_COPY = 3.0


def make(archive: Archive, N: int, V: int, D: int, xp: Any) -> Inputs:
    """Inputs out of the archive, extended; `archive.why_not(V, D)` must be None."""
    e, c, targets = (xp.asarray(x) for x in (archive.e, archive.c, archive.targets))
    normal = np.random.default_rng(0).standard_normal((D, c.shape[1]), dtype=np.float32)
    lift = xp.asarray(np.linalg.qr(normal)[0].T)
    mean = e.mean(axis=0)
    one_nat = mean / (mean @ mean)  # subtracted from a row of c, it lowers that entry's mean logit by 1

    def tokens(start: int, stop: int) -> Any:
        return e[xp.arange(start, stop) % len(e)] @ lift

    def entries(start: int, stop: int) -> Any:
        v = xp.arange(start, stop)
        nats = (v // len(c)).astype(np.float32) * np.float32(NATS_PER_COPY)
        return (c[v % len(c)] - nats[:, None] * one_nat) @ lift

    all_targets = targets[xp.arange(N) % len(targets)].astype(np.int64)
    return Inputs(by_rows(N, D, tokens, xp), by_rows(V, D, entries, xp), all_targets)
