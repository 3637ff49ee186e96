"""A backend with rows of the vocabulary, shard after shard, against the same backend with all of them.

`tests/parallel` has all options and sizes for NumPy; here each backend shows that it knows what a shard asks of it: codes of
targets, draws by the numbers of the whole vocabulary, statistics of others in its backward.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import cce_numba as cce
from cce_numba import interchange
from cce_numba.arguments import SEVERAL_TARGETS
from tests.helpers.cases import make_case
from tests.helpers.distributions import with_ids

OPTIONS = {
    "unbiased": {"filter": "unbiased", "filter_eps": 0.03, "bias": True, "ignore_index": 2, "filter_seed": 5},
    "drop, nothing small": {"filter_eps": 1e-30, "softcap": 4.0},
    "exact, smoothed": {"filter_eps": None, "label_smoothing": 0.2, "z_loss": 0.1},
    "capped, smoothed": {"softcap": 4.0, "label_smoothing": 0.2},
}
EXTRAS = {"entropy": {"entropy": True}, "sum_squares": {"sum_squares": True}, "top_k": {"top_k": 3}}


def in_shards(harness, case, cuts, **more):
    """`(result, gradients)` of each shard, as NumPy."""
    V, options = len(case.c), {"backend": harness.backend} | case.options | more
    parts = []
    for start, stop in itertools.pairwise([0, *cuts, V]):
        given = {name: harness.device(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}
        if "bias" in given:
            given["bias"] = given["bias"][start:stop]
        e, c, targets = (harness.device(x) for x in (case.e, case.c[start:stop], case.targets))
        parts.append(cce.forward_shard(e, c, targets, vocab_start=start, vocab_size=V, accum_e_fp32=True, **given))
    results = [cce.merge(part, [other.packed for other in parts]) for part in parts]
    return [(result, harness.backward(result)) for result in results]


def check(harness, case, cuts, **more):
    harness.skip_unless_it_takes(case.e.dtype)
    whole = harness.forward(case.with_options(**more))
    expected, numbers = harness.backward(whole), harness.numbers(whole)
    shards = in_shards(harness, case, cuts, **more)
    tolerance = {"rtol": 3e-5, "atol": 3e-5}
    for result, _ in shards:
        for name, x in harness.numbers(result).items():
            np.testing.assert_allclose(x, numbers[name], **tolerance, err_msg=name)
        for name in ("entropy", "sum_squares", "top_logprobs", "top_ids"):
            if getattr(whole, name) is not None:
                np.testing.assert_allclose(
                    harness.host(getattr(result, name)), harness.host(getattr(whole, name)), **tolerance, err_msg=name
                )  # fmt: skip
    unit = 1e-4 if case.e.dtype == np.float32 else 0.02
    for name, x in (
        ("e", sum(own.e for _, own in shards)),
        ("c", np.concatenate([own.c for _, own in shards])),
        ("bias", None if expected.bias is None else np.concatenate([own.bias for _, own in shards])),
    ):
        wanted = getattr(expected, name)
        if wanted is not None:
            error, scale = np.linalg.norm(np.float64(x) - np.float64(wanted)), np.linalg.norm(np.float64(wanted))
            assert scale > 0
            assert error <= unit * scale, f"{name} is off by {error} of {scale}"


def cuts_of(V):
    """Off the edges of tiles; one shard has no rows, and one a single one."""
    return V // 3 + 1, V // 3 + 1, V // 3 + 2


def case_of(harness, **options):
    edges = harness.edges
    return make_case(1, (edges.max_n,), edges.max_v, edges.max_d, edges.dtype, ignored=0.2, **options)


@pytest.mark.parametrize("name", OPTIONS)
def test_shards_make_a_whole(harness, name):
    case = case_of(harness, **OPTIONS[name])
    check(harness, case, cuts_of(len(case.c)))


@pytest.mark.parametrize("name", EXTRAS)
def test_extras(harness, name):
    harness.skip_unless_it_has(name)
    case = case_of(harness, filter_eps=None)
    check(harness, case, cuts_of(len(case.c)), **EXTRAS[name])


def test_several_targets(harness):
    harness.skip_unless_it_has(SEVERAL_TARGETS)
    rng = np.random.default_rng(0)
    case = with_ids(case_of(harness, filter="unbiased", filter_eps=0.05), 3, rng)
    check(harness, case, cuts_of(len(case.c)), target_probs=rng.uniform(0, 1, case.targets.shape).astype(np.float32))


def test_a_target_that_nobody_has_is_lost_and_one_of_another_shard_is_not(harness):
    """On the host it raises; the code of a lost target reaches kernels on a device alone, where nobody looks."""
    case = case_of(harness, filter="unbiased", filter_eps=0.05, reduction="none")
    case = case.with_options(check_targets=False)
    case.targets[:] = np.where(case.targets < 0, 0, case.targets)
    case.targets[1], case.targets[3] = len(case.c), -1
    for result, own in in_shards(harness, case, cuts_of(len(case.c))):
        loss, lost = harness.host(result.loss), np.isin(np.arange(len(case.targets)), (1, 3))
        assert np.isnan(loss[lost]).all()
        assert np.isfinite(loss[~lost]).all()
        if result._problem.V:
            assert np.isnan(np.float64(own.c)).all(), "all entries survive in a block with a lost token"
            assert np.isnan(np.float64(own.e[lost])).all()
            assert np.isfinite(np.float64(own.e[~lost])).all()


class Told:
    """A communicator of one rank, to which a second one tells bounds alone."""

    rank, size = 0, 1

    def __init__(self, bound):
        self.bound, self.exchanges = bound, 0

    def all_gather(self, array):
        xp = interchange.array_module(array)
        if array.ndim < 2:
            return array[None]
        self.exchanges += 1
        return (
            array[None] if self.bound is None else xp.stack([array, xp.stack([self.bound, xp.full_like(self.bound, -np.inf)])])
        )

    def all_reduce(self, array):
        return array


def test_bounds_are_exchanged_once_and_taken(harness):
    edges = harness.edges
    case = make_case(4, (edges.max_n,), edges.long_v, 8, edges.dtype, spread=3.0, filter_eps=2.0**-10)
    whole = harness.forward(case)
    arrays, options = harness._arrays(case), harness._options(case)
    flagged = []
    for bound in (None, whole.lse):
        told = Told(bound)
        result = cce.forward(*arrays, communicator=told, **options)
        assert told.exchanges == 1
        flagged.append(harness.kept(result, edges.long_v).sum())
        np.testing.assert_allclose(harness.host(result.loss), harness.host(whole.loss), rtol=1e-5)
    assert flagged[1] < flagged[0], "what others tell is a better bound than what was seen"
    exact = np.exp(np.float64(case.e) @ np.float64(case.c).T - np.float64(harness.host(whole.lse))[:, None])
    kept = harness.kept(result, edges.long_v)
    assert (kept | (exact < 2.0**-10)).all(), "and nothing is missed"
