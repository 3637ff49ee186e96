"""The ways to get gradients that `learning` compares: how they are named, their thresholds, their losses. Imports PyTorch.

exact                             nothing is filtered
drop, unbiased                    that filter, at the threshold that "auto" stands for
drop:2^-12, unbiased:16/V         the same at a threshold: a power of 2, or a multiple of 1 / V of the vocabulary V
paper                             the kernels of the package `cut_cross_entropy`, with its defaults
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.peers import paper
from cce_numba.options import AUTO_SHARES

EXACT, PAPER = "exact", "paper"
DEFAULT = (
    *(EXACT, "drop", "drop:2^-12"),
    *("unbiased:2^-11", "unbiased:2^-12", "unbiased:2^-13", "unbiased:2^-14", "unbiased:16/V", "unbiased:128/V"),
)
_NAME = re.compile(r"exact|paper|(?P<filter>drop|unbiased)(?::(?:2\^-(?P<power>[1-9]\d?)|(?P<times>[1-9]\d{0,5})/V))?")


@dataclass(frozen=True)
class Way:
    """A way by its name, for a vocabulary and a dtype of e and c.

    Attributes:
        filter: "drop", "unbiased", or None for `exact` and `paper`.
        eps: the threshold as a number, None for `exact`.
        filter_eps: the same as the option of this name.
    """

    name: str
    filter: str | None
    eps: float | None
    filter_eps: float | str | None

    @property
    def options(self) -> dict[str, Any]:
        """The options of our loss; not for `paper`."""
        return {"filter_eps": self.filter_eps} | ({} if self.filter is None else {"filter": self.filter})


def way(name: str, vocabulary: int, dtype: torch.dtype) -> Way:
    """The way of this name. Raises ValueError if there is none, or its threshold is no probability below 1.

    >>> way("unbiased:16/V", 65536, torch.bfloat16).options
    {'filter_eps': 0.000244140625, 'filter': 'unbiased'}
    """
    found = _NAME.fullmatch(name)
    if found is None:
        raise ValueError(f"{name!r} is none of exact, drop, unbiased, paper, drop:2^-12, unbiased:16/V and the like")
    smallest = torch.finfo(dtype).eps
    if name == EXACT:
        return Way(name, None, None, None)
    if name == PAPER:
        return Way(name, None, smallest * paper.EPS_SHARE, "auto")
    if found["power"]:
        eps = 2.0 ** -int(found["power"])
    elif found["times"]:
        eps = int(found["times"]) / vocabulary
    else:
        return Way(name, found["filter"], smallest * AUTO_SHARES[found["filter"]], "auto")
    if eps >= 1:
        raise ValueError(f"{name!r} is no threshold below 1 for V={vocabulary}")
    return Way(name, found["filter"], eps, eps)


def ways(names: list[str], vocabulary: int, dtype: torch.dtype) -> list[Way]:
    """The ways of these names, without those whose filter and threshold one before them has. Raises as `way` does."""
    found: dict[Any, Way] = {}
    for each in (way(name, vocabulary, dtype) for name in names):
        found.setdefault((each.filter, each.filter_eps) if each.filter else each.name, each)
    return list(found.values())
