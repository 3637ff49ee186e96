"""Forward of the tensor-core kernels. Both consumers have tiles, the ring comes round, all sizes are ragged."""

from __future__ import annotations

import functools

from benchmarks.small_cases import Check
from tests.helpers.cases import DTYPES, Case, make_case
from tests.helpers.checks import check_forward, check_survivors, expect
from tests.helpers.distributions import check_found, expect_distribution
from tests.helpers.harness import Harness


def checks(harness: Harness, odd: Harness) -> dict[str, Check]:
    """Checks by name. `odd` hands over matrices that the copy engine cannot read as they lie."""
    options = {"ignored": 0.2, "bias": True, "softcap": 5.0, "shift": 1, "reduction": "none"}
    found: dict[str, Check] = {}
    for dtype in DTYPES[:2]:
        cases = {
            "neighbouring tokens": (harness, make_case(2, (300,), 20_003, 328, dtype)),
            "scattered tokens": (harness, make_case(3, (300,), 20_003, 328, dtype, **options)),
            "copied rows": (odd, make_case(4, (2, 70), 203, 21, dtype, **options)),
            "copied rows, exact": (odd, make_case(5, (300,), 20_003, 328, dtype, filter_eps=None)),
        }
        for name, (by, case) in cases.items():
            with_filter = case.with_options(**{"filter_eps": 2.0**-9} | case.options)
            found[f"{dtype} {name}"] = functools.partial(_check, by, with_filter)
    for name, more in {"distributions": {}, "distributions, batch invariant": {"batch_invariant": True}}.items():
        case = make_case(6, (300,), 20_003, 328, DTYPES[1], entropy=True, sum_squares=True, top_k=9, ignored=0.2, **more)
        found[f"{DTYPES[1]} {name}"] = functools.partial(_check_distributions, harness, case)
    return found


def _check_distributions(harness: Harness, case: Case) -> None:
    check_found(expect_distribution(case), harness.logprobs(case))


def _check(harness: Harness, case: Case) -> None:
    expected, result = expect(case), harness.forward(case)
    check_forward(expected, harness.numbers(result))
    if (kept := harness.kept(result, len(case.c))) is not None:
        check_survivors(expected, kept, case.options["filter_eps"], result._statistics.survivor_block)
