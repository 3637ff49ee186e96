"""Every kernel once, on small ragged shapes with all options on, checked against the reference: what sanitizers run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
from rich.console import Console

from cce_numba.commands import machine
from tests.helpers.cases import DTYPES, make_case
from tests.helpers.checks import check_forward, check_gradients, check_survivors, expect
from tests.helpers.harness import GpuHarness


class OddHarness(GpuHarness):
    """Matrices whose rows begin one element into wider ones: no address is aligned, and no distance between rows."""

    def device(self, array: np.ndarray) -> Any:
        """The array in a wider one; a vector as it is."""
        if array.ndim < 2:
            return super().device(array)
        columns = array.shape[-1]
        wider = np.zeros((*array.shape[:-1], columns + 2), array.dtype)
        wider[..., 1 : 1 + columns] = array
        return super().device(wider)[..., 1 : 1 + columns]


def simt(console: Console) -> None:
    """Forward and backward of the portable kernels."""
    harness = GpuHarness("simt")
    for dtype in DTYPES:
        for filter_eps, filter_e_grad, filter_c_grad in ((2.0**-6, True, True), (None, True, True), (2.0**-6, True, False)):
            case = make_case(1, (2, 70), 203, 21, dtype, ignored=0.2, bias=True, softcap=5.0, shift=1, reduction="none")
            case = case.with_options(filter_eps=filter_eps, filter_e_grad=filter_e_grad, filter_c_grad=filter_c_grad)
            expected, result = expect(case), harness.forward(case)
            check_forward(expected, harness.numbers(result))
            d_loss = np.linspace(-1, 1, expected.forward.nll.size).reshape(expected.forward.nll.shape)
            grads = harness.backward(result, d_loss, 0.5)
            check_gradients(expected, grads, harness.kept(result, len(case.c)), d_loss, 0.5)
            console.print(f"simt {dtype!s:10} filter_eps={filter_eps} e={filter_e_grad} c={filter_c_grad}: right")


def hopper(console: Console) -> None:
    """Forward of the tensor-core kernels: both consumers have tiles, the ring comes round, all sizes are ragged."""
    straight, odd = GpuHarness("hopper"), OddHarness("hopper")
    options = {"ignored": 0.2, "bias": True, "softcap": 5.0, "shift": 1, "reduction": "none"}
    for dtype in DTYPES[:2]:
        cases = {
            "neighbouring tokens": (straight, make_case(2, (300,), 20_003, 328, dtype)),
            "scattered tokens": (straight, make_case(3, (300,), 20_003, 328, dtype, **options)),
            "copied rows": (odd, make_case(4, (2, 70), 203, 21, dtype, **options)),
            "copied rows, exact": (odd, make_case(5, (300,), 20_003, 328, dtype, filter_eps=None)),
        }
        for what, (harness, case) in cases.items():
            case = case.with_options(**{"filter_eps": 2.0**-9} | case.options)
            expected, result = expect(case), harness.forward(case)
            check_forward(expected, harness.numbers(result))
            if (kept := harness.kept(result, len(case.c))) is not None:
                check_survivors(expected, kept, case.options["filter_eps"], result._statistics.survivor_block)
            console.print(f"hopper {dtype!s:10} {what}: right")


def main() -> None:
    console = Console(width=100)
    simt(console)
    if (capability := machine.gpus()[0].compute_capability).startswith("9."):
        hopper(console)
    else:
        console.print(f"hopper: not run, since the GPU has compute capability {capability}")


if __name__ == "__main__":
    main()
