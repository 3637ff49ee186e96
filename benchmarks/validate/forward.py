"""What a forward must find, in float64, for a sample of tokens: 256 spread ones, and all of the first and the last block."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

import cce_numba as cce
from benchmarks.data import Inputs
from benchmarks.errors import Wrong
from cce_numba.commands.measure import to_host
from cce_numba.interchange import array_module
from cce_numba.survivors import unpack_survivors

_ERROR = 1e-5  # allowed of a log-sum-exp or a logit, relative to 1 + the largest logit of the token
_SAMPLE = 256  # spread tokens
_NUMBERS = 2**26  # numbers of c that are in float64 at a time


@dataclass(frozen=True)
class ExactForward:
    """The truth for n sampled tokens.

    Attributes:
        tokens: (n,) their numbers, ascending.
        z: (n, V) logits.
        lse: (n,) log-sum-exp.
        targets: (n,) targets.
        target_logit: (n,) logits of the targets.
        allowed: (n,) how far a log-sum-exp or a target logit may be off.
    """

    tokens: Any
    z: Any
    lse: Any
    targets: Any
    target_logit: Any
    allowed: Any


def compute(inputs: Inputs, block: int) -> ExactForward:
    """The truth for the sample. Every token must count; `block` is the number of tokens that share survivors."""
    e, c, targets = inputs
    xp = array_module(e)
    N = len(e)
    spread = np.random.default_rng(0).choice(N, min(_SAMPLE, N), replace=False)
    last_block = (N - 1) // block * block
    tokens = xp.asarray(np.unique(np.concatenate([spread, np.arange(min(block, N)), np.arange(last_block, N)])))
    rows = e.astype(np.float32)[tokens].astype(np.float64)
    z = xp.empty((len(tokens), len(c)))
    step = max(1, _NUMBERS // c.shape[1])
    for start in range(0, len(c), step):
        z[:, start : start + step] = rows @ c[start : start + step].astype(np.float32).astype(np.float64).T
    top = z.max(axis=1)
    lse = top + xp.log(xp.exp(z - top[:, None]).sum(axis=1))
    target_logit = z[xp.arange(len(tokens)), targets[tokens]]
    return ExactForward(tokens, z, lse, targets[tokens], target_logit, _ERROR * (1 + abs(z).max(axis=1)))


def check(exact: ExactForward, **found: Any) -> dict[str, float]:
    """Compares `lse=` and `target_logit=`, each (N,), with the sample: the largest errors as shares of what is allowed.

    Raises Wrong, which names what is off.
    """
    shares = {}
    for name, values in found.items():
        share = float((abs(values[exact.tokens] - getattr(exact, name)) / exact.allowed).max())
        if not share <= 1:  # so written, NaN is wrong as well
            raise Wrong(f"{name}: {share:.3g} times the error that is allowed")
        shares[name] = round(share, 4)
    return shares


def check_survivors(exact: ExactForward, result: cce.Result, filter_eps: float) -> dict[str, float]:
    """Shares of the vocabulary: flagged and truly surviving in the first and the last block, and flagged in all blocks.

    Raises Wrong if a column that survives is not flagged in those two blocks.
    """
    statistics, V = result._statistics, exact.z.shape[1]
    block = statistics.survivor_block
    n_blocks = -(-len(result.lse) // block)
    kept = np.ones((n_blocks, V), bool) if statistics.survivors is None else unpack_survivors(statistics, V)[:n_blocks]
    flagged, surviving = [], []
    for index in sorted({0, n_blocks - 1}):
        mine = exact.tokens // block == index
        probable = exact.z[mine] - exact.lse[mine][:, None] >= math.log(filter_eps)
        survives = to_host(probable.any(axis=0))
        survives[to_host(exact.targets[mine])] = True
        missed = survives & ~kept[index]
        if missed.any():
            raise Wrong(f"survivors: {missed.sum()} columns missed in block {index}, the first is {missed.argmax()}")
        flagged.append(kept[index].mean())
        surviving.append(survives.mean())
    shares = {"flagged": np.mean(flagged), "surviving": np.mean(surviving), "flagged_in_all_blocks": kept.mean()}
    return {name: round(float(share), 5) for name, share in shares.items()}
