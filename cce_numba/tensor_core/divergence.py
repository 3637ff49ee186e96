"""Divergences on tensor cores: what a kernel must know of a teacher, and the arithmetic of one entry in float32."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import cuda

from cce_numba.arguments import Problem
from cce_numba.launch.divergence import Divergence, Functions, functions
from cce_numba.tensor_core.exponentials import LN2, LOG2E, exp2, log2


@dataclass(frozen=True)
class TeacherForm:
    """What a kernel is made for.

    Attributes:
        which: the divergence of the student from the teacher.
        dtype: of the teacher's e and c.
        bias_dtype: of the teacher's bias, or None without one.
        capped: the teacher's logits have a softcap.
    """

    which: Divergence
    dtype: np.dtype
    bias_dtype: np.dtype | None = None
    capped: bool = False

    @staticmethod
    def of(teacher: Problem, which: Divergence) -> TeacherForm:
        """That of a teacher's problem."""
        bias_dtype = None if teacher.bias is None else np.dtype(teacher.bias.dtype)
        return TeacherForm(which, teacher.dtype, bias_dtype, teacher.options.softcap is not None)


@cuda.jit(device=True, forceinline=True)
def exp(x: Any) -> Any:
    """e^x, 0 of -inf."""
    return exp2(x * LOG2E)


@cuda.jit(device=True, forceinline=True)
def log(x: Any) -> Any:
    """The natural logarithm of a number from 1 to 2, within 2^-22."""
    return LN2 * log2(x)


@functools.cache
def make_functions(which: Divergence) -> Functions:
    """The device functions of a divergence, of float32."""
    return functions(which, np.float32, exp, log, forceinline=True)
