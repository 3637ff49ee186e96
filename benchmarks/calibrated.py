"""Made-up inputs whose softmax is as sparse as that of a real model with a vocabulary of 256 000, and their table of fit.

    python benchmarks/calibrated.py                               a sample of 16 blocks with NumPy, all with a GPU
    python benchmarks/calibrated.py --shape 8192 256000 2304      at another hidden size, which only rounds otherwise

A token's logits are the sum of three terms. The first is how frequent an entry is, the same for all tokens; the second is
common to the tokens of one of `TEXTS` texts, which are equal parts of N; the third is the token's own. Its strength differs
widely between tokens: some are all but certain, others wide open. Targets are drawn from that very softmax, so the mean loss
is its entropy. The terms have few directions (`RANK`), which a random orthonormal map lifts to D and which leaves logits as
they are.

`REAL` was measured with a model of 270 million parameters and a vocabulary of 256 000, on 8192 tokens of four texts. The
constants were fitted to it by least squares on the logarithms of the statistics, over all 64 blocks at seed 0; the disorder,
which only tiles depend on, after the others. A smaller vocabulary has the most frequent entries alone, and a larger part of it
survives.
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import inputs
import numpy as np
from rich.console import Console
from rich.table import Table

from cce_numba.commands import machine

BLOCK = 128  # tokens of a block, and entries of a tile
_ROWS = 8192  # of c, in float32 at a time
EPS = (2.0**-12, 2.0**-14, 2.0**-16)
RANK = 192  # directions of the terms that differ between tokens
TEXTS = 4

# How frequent an entry is, in nats: a power law that grows steeper with the rank, as of a vocabulary of many languages, and
# past a certain rank falls off a cliff, as do entries of languages and scripts that none of the texts are in.
_SLOPE, _CURVATURE, _CENTRE = 0.888, 0.162, 6.0  # in log(rank + 3), about the centre
_CLIFF_RANK, _CLIFF_WIDTH, _CLIFF_NATS = 106_380, 7680, 13.36
_TEXT_SPREAD = 1.956  # standard deviation over the vocabulary, in nats
_TOKEN_SPREAD, _TOKEN_POWER = 10.53, 1.168  # likewise, of the token of quantile u: _TOKEN_SPREAD * u**_TOKEN_POWER
_DISORDER = 1.2  # a vocabulary is roughly in the order of frequency: standard deviation of the log of an entry's place


@dataclass(frozen=True)
class Statistics:
    """How sparse a softmax is; tuples have one element for each eps.

    An entry survives in a block if some token of it gives it a probability of eps or more, or has it as its target.
    """

    eps: tuple[float, ...]
    columns: tuple[float, ...]  # part of the vocabulary that survives, mean over the blocks
    union: tuple[float, ...]  # that survives in any of the blocks
    tiles: tuple[float, ...]  # part of the tiles of BLOCK entries that hold a survivor
    dropped: tuple[float, ...]  # probability mass of a token that does not survive, mean
    entries: tuple[float, ...]  # number of entries of a token with a probability of eps or more, mean
    loss: float  # nats, mean


REAL = Statistics(
    eps=EPS,
    columns=(0.019, 0.038, 0.069),
    union=(0.17, 0.26, 0.35),
    tiles=(0.50, 0.72, 0.85),
    dropped=(0.025, 0.010, 0.004),
    entries=(160.0, np.nan, np.nan),  # 130 to 190, from text to text
    loss=3.06,
)


def calibrated(N: int, V: int, D: int, xp: Any, seed: int = 0) -> tuple[Any, Any, Any]:
    """`(e, c, targets)` in bfloat16 and int64; e's mean square is 1.

    Random numbers are NumPy's, so every array module makes the same inputs, up to rounding. Raises ValueError if D <= RANK.
    """
    if D <= RANK:
        raise ValueError(f"D must be more than {RANK}, got {D}")
    of_tokens, of_entries, of_targets, of_lift = (np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(4))
    e, c = (xp.asarray(x) for x in (_tokens(N, of_tokens), _entries(V, of_entries)))
    targets = _drawn(e, c, xp.asarray(of_targets.random(N)), xp)
    lift = xp.asarray(np.linalg.qr(of_lift.standard_normal((D, RANK + 1), dtype=np.float32))[0].T)
    scale = (D / (e * e).sum(axis=1).mean()) ** 0.5 if N else 1.0
    return (
        inputs.by_rows(N, D, lambda start, stop: e[start:stop] @ lift * scale, xp),
        inputs.by_rows(V, D, lambda start, stop: c[start:stop] @ lift / scale, xp),
        targets,
    )


def _tokens(N: int, rng: np.random.Generator) -> np.ndarray:
    """(N, RANK + 1) float32: what a token makes of an entry's frequency, and of its directions."""
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
    """A target for each token, out of its softmax: where the cumulative probability passes the token's quantile."""
    targets = xp.empty(len(e), np.int64)
    for start in range(0, len(e), BLOCK):
        stop = min(start + BLOCK, len(e))
        z = e[start:stop] @ c.T
        z -= z.max(axis=1, keepdims=True)
        upto = xp.cumsum(xp.exp(z, out=z), axis=1, dtype=np.float64)
        below = upto <= quantiles[start:stop, None] * upto[:, -1:]
        targets[start:stop] = xp.minimum(below.sum(axis=1), len(c) - 1)
    return targets


def statistics(
    e: Any, c: Any, targets: Any, xp: Any, blocks: Iterable[int] | None = None, eps: Sequence[float] = EPS
) -> Statistics:
    """Of the given blocks of tokens, or of all; holds the logits of one block at a time."""
    N, V = len(e), len(c)
    blocks = list(range(-(-N // BLOCK)) if blocks is None else blocks)
    union = xp.zeros((len(eps), V), bool)
    columns, tiles, dropped, entries = (np.zeros(len(eps)) for _ in range(4))
    loss, n_tokens = 0.0, 0
    for block in blocks:
        here = slice(block * BLOCK, min((block + 1) * BLOCK, N))
        rows = xp.arange(here.stop - here.start)
        p = _logits(e[here], c, xp)
        p -= p.max(axis=1, keepdims=True)
        target_logit = p[rows, targets[here]]
        xp.exp(p, out=p)
        total = p.sum(axis=1, keepdims=True)
        p /= total
        loss += float((xp.log(total[:, 0]) - target_logit).sum())
        n_tokens += len(rows)
        most, mass = p.max(axis=0), p.sum(axis=0)
        for i, threshold in enumerate(eps):
            survives = most >= threshold
            survives[targets[here]] = True
            union[i] |= survives
            columns[i] += float(survives.mean())
            tiles[i] += float(xp.pad(survives, (0, -V % BLOCK)).reshape(-1, BLOCK).any(axis=1).mean())
            dropped[i] += float(mass[~survives].sum())
            entries[i] += float((p >= threshold).sum())
    return Statistics(
        eps=tuple(eps),
        columns=tuple((columns / len(blocks)).tolist()),
        union=tuple(float(u.mean()) for u in union),
        tiles=tuple((tiles / len(blocks)).tolist()),
        dropped=tuple((dropped / n_tokens).tolist()),
        entries=tuple((entries / n_tokens).tolist()),
        loss=loss / n_tokens,
    )


def _logits(e: Any, c: Any, xp: Any) -> Any:
    """`e @ c.T` in float32 of bfloat16, of which only a part is in float32 at a time."""
    z = xp.empty((len(e), len(c)), np.float32)
    rows = e.astype(np.float32)
    for start in range(0, len(c), _ROWS):
        stop = start + _ROWS
        z[:, start:stop] = rows @ c[start:stop].astype(np.float32).T
    return z


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs=3, type=int, metavar=("N", "V", "D"), default=(8192, 256_000, 256))
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument("--blocks", type=int, help="measure so many, evenly spread; default: all on a GPU, 16 without one")
    arguments = parser.parse_args(argv)
    N, V, D = arguments.shape
    if N < 1 or V < 1 or D <= RANK or (arguments.blocks or 1) < 1:
        parser.error(f"N, V and --blocks must be at least 1, D more than {RANK}")
    why_no_gpu = machine.why_no_gpu()
    xp = np if why_no_gpu else importlib.import_module("cupy")
    n_blocks = -(-N // BLOCK)
    wanted = min(arguments.blocks or (16 if why_no_gpu else n_blocks), n_blocks)
    blocks = [i * n_blocks // wanted for i in range(wanted)]
    start = time.perf_counter()
    e, c, targets = calibrated(N, V, D, xp, arguments.seed)
    float(e[-1, -1]), float(c[-1, -1])  # waits for a GPU
    made = time.perf_counter()
    measured = statistics(e, c, targets, xp, blocks)
    done = time.perf_counter()
    console = Console(width=100)
    console.print(
        fit_table(measured, f"N={N}, V={V}, D={D}, seed {arguments.seed}: {wanted} of {n_blocks} blocks of {BLOCK} tokens")
    )
    if wanted < n_blocks:
        console.print("The union is over the measured blocks alone, the model's over 64.")
    console.print(f"Made in {made - start:.1f} s, measured in {done - made:.1f} s, with {xp.__name__}.")


def fit_table(measured: Statistics, title: str) -> Table:
    """The model's statistics beside those measured, which are of `EPS`."""
    table = Table(title=title)
    for column in ("statistic", "eps", "model", "generated", "generated / model"):
        table.add_column(column, justify="left" if column == "statistic" else "right")

    def add(name: str, eps: str, real: float, ours: float, unit: str, digits: int) -> None:
        table.add_row(name, eps, f"{real:.{digits}f}{unit}", f"{ours:.{digits}f}{unit}", f"{ours / real:.2f}")

    exponents = [f"2^{int(np.log2(x))}" for x in EPS]
    for name, field, digits in _PARTS:
        for eps, real, ours in zip(exponents, getattr(REAL, field), getattr(measured, field), strict=True):
            add(name, eps, 100 * real, 100 * ours, " %", digits)
    add("entries of a token", exponents[0], REAL.entries[0], measured.entries[0], "", 0)
    add("mean loss, nats", "", REAL.loss, measured.loss, "", 2)
    return table


_PARTS = (  # name, field, digits of a percentage
    ("columns that survive in a block", "columns", 1),
    ("columns that survive in some block", "union", 0),
    ("tiles that hold a survivor", "tiles", 0),
    ("probability mass dropped", "dropped", 2),
)

if __name__ == "__main__":
    main()
