"""Arrays that lie as awkwardly as arrays may."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.helpers.harness import GpuHarness, Harness


class Odd(Harness):
    """Mixed into a harness, it makes every matrix's rows begin one element into wider rows.

    So no row's address is aligned, and no distance between rows is.
    """

    def device(self, array: np.ndarray) -> Any:
        """A matrix inside a wider one; a vector as it is."""
        if array.ndim < 2:
            return super().device(array)
        columns = array.shape[-1]
        wider = np.zeros((*array.shape[:-1], columns + 2), array.dtype)
        wider[..., 1 : 1 + columns] = array
        return super().device(wider)[..., 1 : 1 + columns]


class OddGpuHarness(Odd, GpuHarness):
    """Awkward arrays for a backend on a GPU."""
