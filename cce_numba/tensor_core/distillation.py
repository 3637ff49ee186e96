"""The host's part of distillation on tensor cores that does not depend on a kernel: a teacher, as kernels take it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cce_numba.arguments import Problem
from cce_numba.backend import Statistics
from cce_numba.launch.divergence import Divergence
from cce_numba.tensor_core import matrices, parked
from cce_numba.tensor_core.divergence import TeacherForm
from cce_numba.tensor_core.problem import address, matrix_of
from cce_numba.tensor_core.records import Distillation, Heads, LogSums, Teacher


@dataclass(frozen=True, eq=False)
class Head:
    """A head, and what its forward has found."""

    problem: Problem
    statistics: Statistics

    @property
    def sums(self) -> LogSums:
        """Addresses of what the log-sum-exps are made of."""
        return LogSums(self.statistics.max_logit.data.ptr, self.statistics.log_sum.data.ptr)


@dataclass(frozen=True, eq=False)
class Taught:
    """A student's head with its teacher.

    Attributes:
        form: what kernels are made for.
        e: (N, D') the teacher's, in rows that can be copied 16 bytes at a time: its own, or a copy.
        c: (V, D') likewise.
        teacher, heads: the records of these.
        of_student: (N,) float32, the sum of the second of `divergence.Functions.terms`; None until that is known.
        memory: what is at the addresses in `heads`, which must live as long.
    """

    form: TeacherForm
    e: Any
    c: Any
    teacher: Teacher
    heads: Heads
    of_student: Any
    memory: Any

    @staticmethod
    def of(student: Head, teacher: Head, which: Divergence, ctas: int, consumers: int, of_student: Any = None) -> Taught:
        """For kernels of at most so many CTAs, each with so many consumers."""
        p = teacher.problem
        e, c = matrices.aligned(p.e), matrices.aligned(p.c)
        memory = p.xp.empty(parked.bytes_of(ctas, consumers), np.uint8)
        return Taught(
            form=TeacherForm.of(p, which),
            e=e,
            c=c,
            teacher=Teacher(matrix_of(e), matrix_of(c), p.D, address(p.bias), p.options.softcap or 0.0),
            heads=Heads(student.sums, teacher.sums, memory.data.ptr),
            of_student=of_student,
            memory=memory,
        )

    def distillation(self, weight: Any) -> Distillation:
        """What the backward takes; weight (N,) float32: what flows into each token's divergence, times its logit scale."""
        return Distillation(self.teacher, self.heads, weight.data.ptr, self.of_student.data.ptr)
