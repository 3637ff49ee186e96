"""The numbers of e, c and G: how many fit a stage, and how tensor cores multiply them.

bf16, f16   as they are
tf32        float32 numbers, rounded to the 11 significant bits that tensor cores take
f32         float32 numbers, with float32's accuracy: each is the sum of two tf32 numbers, high + low, and a product is
            low * high + high * low + high * high. Eight terms are summed on tensor cores, from zero; such sums are added to
            each other by ordinary additions, since tensor cores cut their sums off where additions round
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from cce_numba.ampere.tiles import ROW_BYTES
from cce_numba.survivors import SURVIVOR_BLOCK


@dataclass(frozen=True)
class Elements:
    """A kind of numbers.

    Attributes:
        name: "bf16", "f16", "tf32" or "f32", see above.
        itemsize: bytes of a number in memory.
    """

    name: str
    itemsize: int

    @property
    def wide(self) -> bool:
        """Whether a number takes 32 bits."""
        return self.itemsize == 4

    @property
    def split(self) -> bool:
        """Whether numbers are split, so that registers are left for the operands of one step, and not for the next one's."""
        return self.name == "f32"

    @property
    def terms(self) -> int:
        """Terms of a sum in a stage."""
        return ROW_BYTES // self.itemsize

    @property
    def panel_bytes(self) -> int:
        """A panel of a stage: a row for each of its terms."""
        return self.terms * ROW_BYTES

    @property
    def parts(self) -> int:
        """Stages that the tokens of a block take, where the sum is over tokens."""
        return SURVIVOR_BLOCK // self.terms

    @property
    def g_row_bytes(self) -> int:
        """A column of G of a block, which is a row in the workspace."""
        return SURVIVOR_BLOCK * self.itemsize


@functools.cache
def elements_of(dtype: np.dtype, allow_tf32: bool = False) -> Elements:
    """Those of a dtype. allow_tf32: float32 numbers may be rounded to tf32.

    >>> elements_of(np.dtype(np.float32)).terms
    32
    """
    if dtype == np.float32:
        return Elements("tf32" if allow_tf32 else "f32", 4)
    return Elements("f16" if dtype == np.float16 else "bf16", 2)
