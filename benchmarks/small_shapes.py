"""Every kernel once, on small ragged shapes with all options on, checked against the reference: what sanitizers run."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
from rich.console import Console

from tests.cases import DTYPES, make_case
from tests.checks import check_forward, check_gradients, expect
from tests.harness import GpuHarness


def main() -> None:
    harness, console = GpuHarness("simt"), Console(width=100)
    for dtype in DTYPES:
        for filter_eps, filter_e_grad, filter_c_grad in ((2.0**-6, True, True), (None, True, True), (2.0**-6, True, False)):
            case = make_case(1, (2, 70), 203, 21, dtype, ignored=0.2, bias=True, softcap=5.0, shift=1, reduction="none")
            case = case.with_options(filter_eps=filter_eps, filter_e_grad=filter_e_grad, filter_c_grad=filter_c_grad)
            expected, result = expect(case), harness.forward(case)
            check_forward(expected, harness.numbers(result))
            d_loss = np.linspace(-1, 1, expected.forward.nll.size).reshape(expected.forward.nll.shape)
            grads = harness.backward(result, d_loss, 0.5)
            check_gradients(expected, grads, harness.kept(result, len(case.c)), d_loss, 0.5)
            console.print(f"{dtype!s:10} filter_eps={filter_eps} e={filter_e_grad} c={filter_c_grad}: right")


if __name__ == "__main__":
    main()
