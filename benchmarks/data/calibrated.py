"""Inputs that are made up to have a softmax as sparse as that of a real model with a vocabulary of 256 000.

A token's logits are the sum of three terms. The first term is how frequent an entry is, which is the same for all tokens.
The second term is common to the tokens of one text; there are `TEXTS` texts, each an equal part of the N tokens. The third
term is the token's own, and its strength differs widely between tokens: some are all but certain, others wide open. Targets
are drawn from that very softmax, so the mean loss is its entropy. The terms span few directions (`RANK`). A random
orthonormal map lifts these to D, which leaves the logits as they are.

The constants were fitted to `sparsity.REAL` by least squares on the logarithms of the statistics, over all 64 blocks at
seed 0. The disorder, on which tiles alone depend, was fitted after the others. A smaller vocabulary has the most frequent
entries alone, and a larger share of it survives.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.data import Inputs
from benchmarks.data.rows import by_rows

RANK = 192  # directions of the terms that differ between tokens
TEXTS = 4
_STEP = 128  # tokens whose logits are in memory at a time

# How frequent an entry is, in nats: a power law that grows steeper with the rank, as that of a vocabulary of many languages
# does. Past a certain rank it falls off a cliff, as entries do whose languages and scripts none of the texts is in.
_SLOPE, _CURVATURE, _CENTRE = 0.888, 0.162, 6.0  # in log(rank + 3), about the centre
_CLIFF_RANK, _CLIFF_WIDTH, _CLIFF_NATS = 106_380, 7680, 13.36
_TEXT_SPREAD = 1.956  # standard deviation of the second term over the vocabulary, in nats
_TOKEN_SPREAD, _TOKEN_POWER = 10.53, 1.168  # that of the third, for the token of quantile u: _TOKEN_SPREAD * u**_TOKEN_POWER
_DISORDER = 1.2  # a vocabulary is roughly in the order of frequency: standard deviation of the log of an entry's place


def make(N: int, V: int, D: int, xp: Any, seed: int = 0) -> Inputs:
    """Inputs whose e has a mean square of 1. Raises ValueError if D <= RANK.

    The random numbers are NumPy's, so every array module makes the same inputs, up to rounding.
    """
    if D <= RANK:
        raise ValueError(f"D must be more than {RANK}, got {D}")
    of_tokens, of_entries, of_targets, of_lift = (np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(4))
    e, c = (xp.asarray(x) for x in (_tokens(N, of_tokens), _entries(V, of_entries)))
    targets = _drawn(e, c, xp.asarray(of_targets.random(N)), xp)
    lift = xp.asarray(np.linalg.qr(of_lift.standard_normal((D, RANK + 1), dtype=np.float32))[0].T)
    scale = (D / (e * e).sum(axis=1).mean()) ** 0.5 if N else 1.0
    return Inputs(
        by_rows(N, D, lambda start, stop: e[start:stop] @ lift * scale, xp),
        by_rows(V, D, lambda start, stop: c[start:stop] @ lift / scale, xp),
        targets,
    )


def _tokens(N: int, rng: np.random.Generator) -> np.ndarray:
    """(N, RANK + 1) float32: how much a token takes of an entry's frequency (1), and of each of its directions."""
    texts = np.linalg.qr(rng.standard_normal((RANK, TEXTS)))[0].T
    spread = _TOKEN_SPREAD * rng.random((N, 1)) ** _TOKEN_POWER
    own = rng.standard_normal((N, RANK), dtype=np.float32)
    own /= np.linalg.norm(own, axis=1, keepdims=True)
    e = np.ones((N, RANK + 1), np.float32)
    e[:, 1:] = _TEXT_SPREAD * texts[np.arange(N) * TEXTS // max(N, 1)] + spread * own
    return e


def _entries(V: int, rng: np.random.Generator) -> np.ndarray:
    """(V, RANK + 1) float32: an entry's frequency in nats, about its mean, and its directions."""
    rank = np.arange(V)
    log_rank = np.log(rank + 3)
    nats = -_SLOPE * log_rank - _CURVATURE * (log_rank - _CENTRE) ** 2
    nats -= _CLIFF_NATS / (1 + np.exp((_CLIFF_RANK - rank) / _CLIFF_WIDTH))
    order = np.argsort(log_rank + _DISORDER * rng.standard_normal(V))  # ranks, place by place
    c = np.empty((V, RANK + 1), np.float32)
    c[:, 0] = nats - nats.mean()
    c[:, 1:] = rng.standard_normal((V, RANK), dtype=np.float32)
    return c[order]


def _drawn(e: Any, c: Any, quantiles: Any, xp: Any) -> Any:
    """(N,) int64: a target for each token out of its softmax, where the cumulative probability passes the token's quantile."""
    targets = xp.empty(len(e), np.int64)
    for start in range(0, len(e), _STEP):
        stop = min(start + _STEP, len(e))
        z = e[start:stop] @ c.T
        z -= z.max(axis=1, keepdims=True)
        upto = xp.cumsum(xp.exp(z, out=z), axis=1, dtype=np.float64)
        below = upto <= quantiles[start:stop, None] * upto[:, -1:]
        targets[start:stop] = xp.minimum(below.sum(axis=1), len(c) - 1)
    return targets
