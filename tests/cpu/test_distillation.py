"""Distillation on the host: its memory, and that its filter is right on average."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

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


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_right_on_average(kind):
    """Errors of means fall as one over the root of their number; those of the filter that drops stay."""
    rng = np.random.default_rng(4)
    N, V = 260, 300
    student, teacher = (heads(rng, (N,), V, D, np.float64, spread=1.0) for D in (8, 12))
    arrays = student.e, student.c, teacher.e, teacher.c
    named = {"kind": kind, "filter_eps": 0.04}

    def error(found):
        return [np.linalg.norm(x - y) / np.linalg.norm(y) for x, y in zip(found, exact, strict=True)]

    def gradients(**options):
        grads = cce.linear_distillation_with_grad(*arrays, **(named | options))[1]
        return grads.e, grads.c

    exact = gradients(filter_eps=None)
    each = [gradients(filter_seed=k) for k in range(256)]
    means = [np.mean([found[i] for found in each], axis=0) for i in range(2)]
    single = np.mean([error(found) for found in each], axis=0)
    for mean, one, dropped in zip(error(means), single, error(gradients(filter="drop")), strict=True):
        assert one > 0.01
        assert mean < 2 / 16 * one
        assert dropped > 2 / 16 * one
