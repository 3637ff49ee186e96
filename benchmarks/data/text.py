"""Text for a language model to learn: token ids of a file, or drawn from a fixed chain, spread over a vocabulary.

A file of ids is what `numpy.save` writes of a 1-d array of uint16: the ids of one long text in its order, of any tokenizer with
at most 65536 entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

VALIDATION_SHARE = 0.05
_STREAMS = 64  # of the chain, which are drawn at the same time and stand one after the other
_FOLLOWERS, _FOLLOWED = 4, 0.7  # a symbol has so many followers, of which one comes next with this probability


@dataclass(frozen=True)
class Text:
    """A name for tables, and the ids (tokens,) uint16, in order."""

    name: str
    ids: np.ndarray

    @property
    def entries(self) -> int:
        """How many vocabulary entries the ids need at least."""
        return int(self.ids.max()) + 1

    def spread(self, vocabulary: int) -> np.ndarray:
        """The ids (tokens,) int64 in [0, vocabulary).

        They stay as they are in a vocabulary that is less than twice as large as they need. A larger one gets them spread over
        it by a fixed random map that takes no two ids to one entry; its other entries never occur. `vocabulary` must be at
        least `entries`.
        """
        if vocabulary < 2 * self.entries:
            return self.ids.astype(np.int64)
        return np.random.default_rng(0).permutation(vocabulary)[: self.entries][self.ids]


def read(path: str, at_least: int) -> Text:
    """Reads a file of ids. Raises OSError if that fails, ValueError for another kind of file or fewer than `at_least` ids."""
    ids = np.lib.format.open_memmap(path, mode="r")  # executes nothing, and takes .npy alone
    if ids.ndim != 1 or ids.dtype != np.uint16:
        got = f"{ids.dtype} of shape {ids.shape}"
        raise ValueError(f"must hold a 1-d array of uint16, the token ids of one long text, got {got}")
    if len(ids) < at_least:
        raise ValueError(f"must hold at least {at_least} token ids, got {len(ids)}")
    return Text(Path(path).name, np.array(ids))


def drawn(length: int, symbols: int) -> Text:
    """Text that is the same each time, of a chain in which each symbol has a few followers and a rank, as in Zipf's law.

    >>> drawn(256, 50).ids[:4]
    array([ 4, 10,  3,  4], dtype=uint16)
    """
    rng = np.random.default_rng(0)
    common = np.cumsum(1 / (np.arange(symbols) + 3.0))

    def by_rank(shape: int | tuple[int, int]) -> np.ndarray:
        return np.searchsorted(common, common[-1] * rng.random(shape), side="right")

    followers = by_rank((symbols, _FOLLOWERS))
    ids = np.empty((_STREAMS, -(-length // _STREAMS)), np.int64)
    now = by_rank(_STREAMS)
    for step in range(ids.shape[1]):
        ids[:, step] = now
        follows = followers[now, rng.integers(_FOLLOWERS, size=_STREAMS)]
        now = np.where(rng.random(_STREAMS) < _FOLLOWED, follows, by_rank(_STREAMS))
    return Text(f"drawn from a chain of {symbols} symbols", ids.reshape(-1)[:length].astype(np.uint16))


def split(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The text to learn, and its end, which is for validation and never learned."""
    end = len(ids) - int(VALIDATION_SHARE * len(ids))
    return ids[:end], ids[end:]
