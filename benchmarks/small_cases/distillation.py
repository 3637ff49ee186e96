"""A student's head and a teacher's: the teacher's stages come before the student's, in the forward's kernel and the backward's.

Both consumers have tiles, hidden sizes differ and are ragged, and dE and dC take one job in a row, or two for a pair of CTAs.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from benchmarks.small_cases import Check
from reference.distillation import KINDS
from tests.helpers.cases import DTYPES
from tests.helpers.distillation import check, heads
from tests.helpers.harness import Harness

N, V = 300, 2003


def checks(harness: Harness, odd: Harness) -> dict[str, Check]:
    """Checks by name. `odd` hands over matrices that the copy engine cannot read as they lie."""
    found: dict[str, Check] = {}
    for kind in KINDS:
        found[f"{kind}, pairs"] = functools.partial(_check, harness, 328, 72, kind=kind)
        found[f"{kind}, single CTAs"] = functools.partial(_check, harness, 72, 328, kind=kind)
    found["scattered tokens"] = functools.partial(_check, harness, 200, 136, True, kind="jsd", temperature=2.0)
    found["copied rows"] = functools.partial(_check, odd, 201, 75, True, kind="reverse_kl")
    return found


def _check(harness: Harness, D: int, teacher_D: int, everything: bool = False, **options: Any) -> None:
    """everything: with ignored tokens, biases, softcaps, and dtypes that differ."""
    rng = np.random.default_rng(D)
    student = heads(rng, (N,), V, D, DTYPES[1], bias=everything, softcap=9.0 if everything else None)
    teacher = heads(
        rng, (N,), V, teacher_D, DTYPES[0 if everything else 1], bias=everything, softcap=7.0 if everything else None
    )
    if everything:
        options["targets"] = np.where(rng.random(N) < 0.2, -100, 0)
    check(harness, student, teacher, rng.normal(size=N), reduction="none", **options)
