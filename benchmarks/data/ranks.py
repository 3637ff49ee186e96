"""How the probabilities of a real last layer fall with their rank, and what survives a threshold. NumPy or CuPy, float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.data.archive import Archive
from cce_numba.commands.measure import to_host

BLOCK = 128  # tokens of a block, and entries of a tile
POWERS = (8, 10, 12, 14, 16)  # thresholds 2^-power
_PERCENTILES = (10, 50, 90)


def measure(archive: Archive, xp: Any, tokens: int, done: Callable[[], None]) -> dict[str, Any]:
    """Of the archive's first tokens, block by block; `done` is called after each block.

    Returns the mean probability of each rank over the tokens, as `mean`, with `p10`, `p50` and `p90`, for the ranks `rank`; the
    tokens' mean `loss`, and how far losses are from the archive's known ones. For each threshold it returns shares of the
    vocabulary, means over the blocks: `columns` that survive, `tiles` of 128 entries that hold one; and means over the tokens:
    `entries` at or above it, and `dropped`, the probability in columns that do not survive.
    """
    e, c = xp.asarray(archive.e[:tokens]), xp.asarray(archive.c)
    targets = xp.asarray(archive.targets[:tokens].astype(np.int64))
    known = archive.loss[:tokens]
    V, blocks = len(c), -(-len(e) // BLOCK)
    total, of_ranks = xp.zeros(V), []
    columns, tiles, entries, dropped = (np.zeros(len(POWERS)) for _ in range(4))
    losses = []
    for start in range(0, len(e), BLOCK):
        p, own = e[start : start + BLOCK] @ c.T, targets[start : start + BLOCK]
        p -= p.max(axis=1, keepdims=True)
        rows = xp.arange(len(p))
        target_logit = p[rows, own].copy()
        xp.exp(p, out=p)
        sums = p.sum(axis=1, keepdims=True)
        losses.append(to_host(xp.log(sums[:, 0]) - target_logit))
        p /= sums
        for i, power in enumerate(POWERS):
            survives = p.max(axis=0) >= 2.0**-power
            survives[own] = True
            columns[i] += float(survives.mean()) / blocks
            tiles[i] += float(xp.pad(survives, (0, -V % BLOCK)).reshape(-1, BLOCK).any(axis=1).mean()) / blocks
            entries[i] += float((p >= 2.0**-power).sum()) / len(e)
            dropped[i] += float(p[:, ~survives].sum()) / len(e)
        p.sort(axis=1)
        p = p[:, ::-1]
        total += p.sum(axis=0, dtype=np.float64)
        of_ranks.append(to_host(p[:, _shown(V) - 1]))
        done()
    every = np.concatenate(of_ranks)
    loss = np.concatenate(losses)
    spread = dict(zip((f"p{at}" for at in _PERCENTILES), np.percentile(every, _PERCENTILES, axis=0), strict=True))
    return {
        "N": len(e),
        "V": V,
        "D": c.shape[1],
        "loss": round(float(loss.mean(dtype=np.float64)), 6),
        "apart_from_known_loss": round(float(np.abs(loss - known).max()), 6),
        "mean_apart_from_known_loss": round(abs(float((loss - known).mean(dtype=np.float64))), 8),
        "rank": _shown(V).tolist(),
        "mean": [float(f"{x:.4g}") for x in to_host(total)[_shown(V) - 1] / len(e)],
        **{name: [float(f"{x:.4g}") for x in values] for name, values in spread.items()},
        "thresholds": [
            {
                "power": power,
                "columns": round(float(columns[i]), 6),
                "tiles": round(float(tiles[i]), 6),
                "entries": round(float(entries[i]), 3),
                "dropped": round(float(dropped[i]), 6),
                "mean_rank": int((to_host(total) / len(e) >= 2.0**-power).sum()),
            }
            for i, power in enumerate(POWERS)
        ],
    }


def _shown(V: int) -> np.ndarray:
    """Ranks that are kept, evenly spaced on a logarithmic axis: all of the first ones, 24 of each doubling at most."""
    return np.unique(np.round(np.geomspace(1, V, 24 * max(1, int(np.log2(max(V, 2)))))).astype(np.int64))
