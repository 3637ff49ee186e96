"""Real text and a real model's probabilities, from `data/`, whose README says where they come from."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_DATA = Path(__file__).parents[1] / "data"
_STEPS = 8  # of log2, in the file


@dataclass(frozen=True, eq=False)
class RealLogits:
    """What a model of 135 million parameters thinks of 128 tokens of Moby Dick.

    Attributes:
        logits: (128, V) float32. Those of entries with a probability below 2^-16 are one number per token, chosen so that their
            sum is right; the others are true to a twelfth of a nat.
        targets: (128,) the tokens that came next.
        words: words of the targets, and of the likeliest entries of each token, by their number.
        before: (40,) the tokens that came before.
        ranks, mean, quantiles: at some ranks, the probability of the entry of that rank among all, over 4096 tokens of two
            texts: its mean, and (3, ...) its 10th, 50th and 90th per cent.
    """

    logits: np.ndarray
    targets: np.ndarray
    words: dict[int, str]
    before: np.ndarray
    ranks: np.ndarray
    mean: np.ndarray
    quantiles: np.ndarray

    def text(self, ids: np.ndarray) -> list[str]:
        """The words of tokens."""
        return [self.words[int(i)] for i in ids]


@functools.cache
def smollm2() -> RealLogits:
    """SmolLM2-135M-Instruct's, Apache-2.0."""
    with np.load(_DATA / "smollm2_extract.npz") as file:
        d = dict(file)
    tokens, V = len(d["lse"]), int(d["vocabulary"])
    kept = d["count"].sum()
    token = np.repeat(np.arange(tokens), d["count"])
    first = np.cumsum(d["count"]) - d["count"]
    total = np.cumsum(d["gap"].astype(np.int64))
    entry = total - np.repeat(total[first] - d["gap"][first], d["count"])
    assert kept == len(entry)
    rest = np.log(d["rest"] / (V - d["count"]))  # natural log of the probability of each entry that was left out
    log_p = np.repeat(rest[:, None], V, axis=1).astype(np.float32)
    log_p[token, entry] = -np.log(2) / _STEPS * d["step"]
    log_p[np.arange(tokens), d["targets"]] = d["target_logit"] - d["lse"]  # exactly
    words = bytes(d["words"]).decode().split("\0")
    return RealLogits(
        logits=log_p + d["lse"][:, None],
        targets=d["targets"].astype(np.int64),
        words=dict(zip(d["told"].tolist(), words, strict=True)),
        before=d["before"].astype(np.int64),
        ranks=d["ranks"],
        mean=d["rank_mean"],
        quantiles=d["rank_quantiles"],
    )


@functools.cache
def addresses() -> tuple[np.ndarray, list[str]]:
    """`(tokens, words)`: (60000,) of US presidents' addresses, and the words that they number."""
    with np.load(_DATA / "addresses.npz") as file:
        return file["tokens"].astype(np.int64), bytes(file["words"]).decode().split("\0")
