"""The memory of distillation on the host."""

from __future__ import annotations

import tracemalloc

import numpy as np

import cce_numba as cce
from tests.backends.test_distillation import KINDS, heads


def test_memory_is_bounded():
    rng = np.random.default_rng(3)
    N, V = 1500, 30_000
    student, teacher = heads(rng, (N,), V, 32, np.float32), heads(rng, (N,), V, 48, np.float32)
    cce.linear_distillation_with_grad(student.e[:9], student.c[:99], teacher.e[:9], teacher.c[:99])
    for kind in KINDS:
        tracemalloc.start()
        cce.linear_distillation_with_grad(student.e, student.c, teacher.e, teacher.c, kind=kind)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        gradients = student.e.nbytes + student.c.nbytes
        assert peak - gradients < 80 * 2**20 < N * V * 4, peak
