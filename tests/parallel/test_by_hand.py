"""`forward_shard` and `merge`, for those who carry numbers between ranks themselves; here all shards are in one process."""

from __future__ import annotations

import numpy as np
import pytest

import cce_numba as cce
from cce_numba.backend import StatisticsForm
from cce_numba.parallel.numbers import of_no_rows
from tests.helpers.cases import make_case

CASE = make_case(0, (3, 50), 61, 6, np.dtype(np.float64), ignored=0.2, filter="unbiased", filter_eps=0.05, shift=1)
CUTS = ((0, 10), (10, 10), (10, 61))


def parts_of(case, **more):
    options = case.options | more
    return [
        cce.forward_shard(case.e, case.c[a:b], case.targets, vocab_start=a, vocab_size=61, backend="cpu", **options)
        for a, b in CUTS
    ]


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_a_shard_without_rows_lists_its_tokens_as_its_backend_does(dtype):
    """Kernels that reduce the loss read the list."""
    problem = parts_of(CASE)[1]._partial.problem
    found = of_no_rows(problem, StatisticsForm(np.dtype(dtype), survivor_block=64))
    assert found.tokens.dtype == dtype
    assert found.survivor_block == 64
    counting = np.pad(CASE.targets[:, 1:] >= 0, ((0, 0), (0, 1)))  # the last token of a row has no target
    np.testing.assert_array_equal(found.tokens[: found.n_valid], np.flatnonzero(counting))


@pytest.mark.parametrize("how", ["list", "array"])
def test_parts_come_together(how):
    parts = parts_of(CASE)
    packed = [part.packed for part in parts]
    results = [cce.merge(part, packed if how == "list" else np.stack(packed)) for part in parts]
    one = cce.forward(CASE.e, CASE.c, CASE.targets, backend="cpu", **CASE.options)
    expected, grads = cce.backward(one), [cce.backward(result) for result in results]
    for result in results:
        np.testing.assert_allclose(result.loss, one.loss, rtol=1e-12)
        np.testing.assert_array_equal(result.lse, results[0].lse)
    np.testing.assert_allclose(np.concatenate([own.c for own in grads]), expected.c, atol=1e-12)
    np.testing.assert_allclose(sum(own.e for own in grads), expected.e, atol=1e-12)
    assert not grads[1].e.any(), "a shard without rows has no part of it"
    np.testing.assert_allclose(sum(r.dropped_mass() for r in results), one.dropped_mass(), atol=1e-12)


def test_packed_numbers_are_small():
    assert parts_of(CASE)[0].packed.nbytes == 3 * 8 * 150
    assert parts_of(CASE, entropy=True, label_smoothing=0.1)[0].packed.nbytes == 5 * 8 * 150


def test_numbers_of_another_call_are_refused():
    first, other = parts_of(CASE)[0], parts_of(CASE, entropy=True)[1]
    with pytest.raises(ValueError, match="numbers: must be those of the same tokens and options, 3600 bytes, got 4800"):
        cce.merge(first, [first.packed, other.packed])


@pytest.mark.parametrize(("start", "size"), [(-1, 61), (60, 61), (0, 9), (0, 0)])
def test_rows_must_lie_in_the_vocabulary(start, size):
    with pytest.raises(
        ValueError, match=f"vocab_start: the rows of c must lie in the vocabulary, got 10 rows from {start} on of"
    ):
        cce.forward_shard(CASE.e, CASE.c[:10], CASE.targets, vocab_start=start, vocab_size=size)


def test_arrays_may_change_between_the_halves():
    targets = CASE.targets.copy()
    parts = [
        cce.forward_shard(CASE.e, CASE.c[a:b], targets, vocab_start=a, vocab_size=61, backend="cpu", **CASE.options)
        for a, b in CUTS
    ]
    targets[:] = 0
    loss = cce.merge(parts[0], [part.packed for part in parts]).loss
    one = cce.linear_cross_entropy(CASE.e, CASE.c, CASE.targets, backend="cpu", **CASE.options)
    np.testing.assert_allclose(loss, one, rtol=1e-12)
