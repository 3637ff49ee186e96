"""The problems that the demo computes: one made up to behave like a language model's, or one from a file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cce_numba.commands import DTYPES, UsageError, npz
from cce_numba.commands.npz import Wanted
from cce_numba.interchange import BFLOAT16

IGNORE_INDEX = -100

_CONTENT = (
    "a demo file holds e (N, D) and c (V, D) in float16, float32, float64 or bfloat16 (as uint16 bit patterns), "
    "targets (N,) of integers, and optionally loss (N,)"
)
_NUMBERS = Wanted(kinds="fiubV", itemsize=8, ndim=None)  # V: how NumPy stores a type that it does not know, like bfloat16
# What tokens have in common with their neighbours, how far logits spread, and how much embeddings favour their target:
# chosen so that loss, confidence and the number of likely entries come out as they do for small models on real text.
_SEGMENT, _TOPIC_SHARE, _SPREAD, _FAVOUR = 256, 0.7, 3.0, (4.0, 16.0)


@dataclass(frozen=True)
class DemoProblem:
    """What the demo computes, in NumPy arrays.

    Attributes:
        e: (N, D) embeddings.
        c: (V, D) classifier, of e's dtype.
        targets: (N,) int64 in [0, V), or `IGNORE_INDEX`.
        known_loss: (N,) each token's loss as the file tells it, or None.
        source: one line on where it comes from.
    """

    e: np.ndarray
    c: np.ndarray
    targets: np.ndarray
    known_loss: np.ndarray | None
    source: str

    def astype(self, dtype: str | None) -> DemoProblem:
        """With e and c cast to a dtype out of `DTYPES`; None leaves them."""
        if dtype is None:
            return self
        target = BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype)
        with np.errstate(over="ignore"):  # too large for the dtype is inf, and shows in the result
            return replace(self, e=self.e.astype(target, copy=False), c=self.c.astype(target, copy=False))


def synthetic(tokens: int, vocab: int, dim: int, seed: int = 0) -> DemoProblem:
    """A problem in float32 whose softmax is as sparse, and whose targets are as likely, as a language model's on real text.

    Plain random embeddings would not do: their softmax is flat, or peaked on the wrong entries.

    >>> problem = synthetic(3, 8, 4)
    >>> problem.e.shape, problem.c.shape, problem.targets.shape
    ((3, 4), (8, 4), (3,))
    """
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    c = normal(vocab, dim)
    c /= np.sqrt(np.float32(dim))
    frequency = 1 / np.arange(3.0, vocab + 3.0)  # Zipf's law; frequent entries come first, as in real tokenizers
    frequency /= frequency.sum()
    targets = rng.choice(vocab, tokens, p=frequency)
    topics = np.repeat(normal(-(-tokens // _SEGMENT), dim), _SEGMENT, axis=0)[:tokens]
    e = np.float32(_SPREAD * _TOPIC_SHARE**0.5) * topics
    e += np.float32(_SPREAD * (1 - _TOPIC_SHARE) ** 0.5) * normal(tokens, dim)
    e += rng.uniform(*_FAVOUR, (tokens, 1)).astype(np.float32) * c[targets]  # from hardly guessed to nearly certain
    # One dimension carries the frequencies, so that an entry's logit starts from how common it is.
    c[:, 0] = np.log(frequency) / 4
    e[:, 0] = 4
    source = "synthetic text: frequencies by Zipf's law, topics, targets from hardly guessed to nearly certain"
    return DemoProblem(e, c, targets.astype(np.int64), None, f"{source} (seed {seed})")


def load(path: str, tokens: int | None, dtype: str | None) -> DemoProblem:
    """Reads a demo file: its first `tokens` tokens (None: all), cast to `dtype` (None: its own).

    Raises UsageError, naming the file and what must come, for whatever is wrong with it.
    """
    arrays = _read(path)
    e, c = (_floats(path, name, arrays[name]) for name in ("e", "c"))
    targets, loss = arrays["targets"], arrays.get("loss")
    if e.ndim != 2 or c.ndim != 2 or e.shape[1:] != c.shape[1:] or 0 in c.shape:
        raise _wrong(path, f"e and c must have shapes (N, D) and (V, D), got {e.shape} and {c.shape}")
    if dtype is None and e.dtype != c.dtype:
        raise _wrong(path, f"e is {e.dtype} and c is {c.dtype}; choose one dtype for both with --dtype")
    if targets.shape != e.shape[:1] or targets.dtype.kind not in "iu":
        raise _wrong(path, f"targets must be (N,) = {e.shape[:1]} integers, got {targets.dtype} of shape {targets.shape}")
    if loss is not None and (loss.shape != e.shape[:1] or loss.dtype.kind != "f"):
        raise _wrong(path, f"loss must be (N,) = {e.shape[:1]} real numbers, got {loss.dtype} of shape {loss.shape}")
    if tokens is not None and tokens > len(e):
        raise _wrong(path, f"has {len(e)} tokens, --tokens asks for {tokens}")
    targets = targets[:tokens]
    wrong = (targets != IGNORE_INDEX) & ((targets < 0) | (targets >= len(c)))
    if wrong.any():
        first = targets[wrong][0]
        raise _wrong(path, f"targets must lie in [0, V) = [0, {len(c)}) or be {IGNORE_INDEX}, one is {first}")
    if not (targets != IGNORE_INDEX).any():
        raise _wrong(path, f"has no token that counts: there are none, or all targets are {IGNORE_INDEX}")
    known_loss = None if loss is None else loss[:tokens]
    return DemoProblem(e[:tokens], c, targets.astype(np.int64), known_loss, f"file {path}").astype(dtype)


def _read(path: str) -> dict[str, np.ndarray]:
    """The arrays of the file by name. The file is not trusted: see `npz`."""
    if not Path(path).exists():
        raise UsageError(f"{path}: no such file; {_CONTENT}")
    try:
        there = npz.names(path)
        if missing := [name for name in ("e", "c", "targets") if name not in there]:
            raise _wrong(path, f"lacks {', '.join(missing)}; it has {', '.join(there) or 'nothing'}")
        return npz.arrays(path, {name: _NUMBERS for name in ("e", "c", "targets", "loss") if name in there})
    except (OSError, ValueError) as error:
        raise _wrong(path, f"cannot be read as an npz file ({error})") from error


def _floats(path: str, name: str, array: np.ndarray) -> Any:
    """The array, with bfloat16 told from how it can be stored: bit patterns, or NumPy's two bytes of a type it did not know."""
    if array.dtype == np.uint16 or array.dtype == np.dtype("V2"):
        return array.view(BFLOAT16)
    if array.dtype.name not in DTYPES:
        raise _wrong(path, f"{name} must be one of {', '.join(DTYPES)}, got {array.dtype}")
    return array


def _wrong(path: str, what: str) -> UsageError:
    return UsageError(f"{path}: {what}; {_CONTENT}")
