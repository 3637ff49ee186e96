"""Forward and backward of the portable kernels, with all options on."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from benchmarks.small_cases import Check
from tests.helpers.cases import DTYPES, make_case
from tests.helpers.checks import check_forward, check_gradients, expect
from tests.helpers.harness import Harness

_FILTERS: tuple[dict[str, Any], ...] = (
    {"filter_eps": 2.0**-6},
    {"filter_eps": None},
    {"filter_eps": 2.0**-6, "filter_c_grad": False},
)


def checks(harness: Harness) -> dict[str, Check]:
    """Checks by name."""
    return {
        f"{dtype} {', '.join(f'{name}={value}' for name, value in filters.items())}": functools.partial(
            _check, harness, dtype, filters
        )
        for dtype in DTYPES
        for filters in _FILTERS
    }


def _check(harness: Harness, dtype: np.dtype, filters: dict[str, Any]) -> None:
    case = make_case(1, (2, 70), 203, 21, dtype, ignored=0.2, bias=True, softcap=5.0, shift=1, reduction="none", **filters)
    expected, result = expect(case), harness.forward(case)
    check_forward(expected, harness.numbers(result))
    d_loss = np.linspace(-1, 1, expected.forward.nll.size).reshape(expected.forward.nll.shape)
    grads = harness.backward(result, d_loss, 0.5)
    check_gradients(expected, grads, harness.kept(result, len(case.c)), d_loss, 0.5)
