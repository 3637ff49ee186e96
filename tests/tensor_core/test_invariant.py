"""With `batch_invariant=True` sums are cut without regard to the batch: schedules, phases and rounds, by arithmetic alone."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cce_numba import gpu
from cce_numba.backend import Gradients, Statistics, Weights
from cce_numba.options import Options
from tests.helpers.harness import SimulatorHarness

if SimulatorHarness.is_active():
    pytest.skip("the simulator has none of these kernels", allow_module_level=True)

from cce_numba.ampere.tiles import tiles_for
from cce_numba.hopper.backward import workspace
from cce_numba.hopper.tiles import HopperTiles
from cce_numba.interchange import BFLOAT16
from cce_numba.tensor_core import schedule
from cce_numba.tensor_core.backward import passes
from cce_numba.tensor_core.layout import Layout
from tests.hopper.forward.test_layout import Problem

TOKENS = (1, 300, 8192, 100_000)


def pieces(worker, workers, groups, per_round, tiles):
    """All pieces of work of a worker by a fixed schedule: `(group, first, last, step, slot)`."""
    found = []
    while True:
        piece = tuple(map(int, schedule.fixed_segment(len(found), worker, workers, groups, per_round, tiles)))
        if piece[-1] == schedule.NO_SLOT:
            return found
        found.append(piece)


@given(workers=st.integers(1, 80), groups=st.integers(0, 40), tiles=st.integers(1, 60), data=st.data())
def test_a_fixed_schedule(workers, groups, tiles, data):
    """Each tile once, in slots of their own that the merge finds; as many workers for each group, however many these are."""
    per_round = data.draw(st.integers(1, workers), label="per_round")
    times, slots = np.zeros((groups, tiles), int), {}
    for worker in range(workers):
        for group, first, last, step, slot in pieces(worker, workers, groups, per_round, tiles):
            times[group, first:last:step] += 1
            assert (last, step) == (tiles, workers // per_round)
            assert slot not in slots
            slots[slot] = group, first
    assert (times == 1).all()
    assert all(0 <= slot < schedule.count_slots(workers, groups, per_round) for slot in slots)
    for group in range(groups):
        first, step, count, extra = map(int, schedule.fixed_slots_of(group, workers, groups, per_round, tiles))
        assert extra == schedule.NO_SLOT
        assert count == workers // per_round
        # In the order of the parts of the vocabulary, so that all groups are merged alike.
        assert [slots[first + i * step] for i in range(count)] == [(group, i) for i in range(count)]


def problem(N, V, D, dtype=BFLOAT16, **given):
    p = Problem(N, V, D)
    p.options, p.dtype, p.K = Options.of(dtype, given), dtype, None
    return p


@pytest.mark.parametrize(("cc", "tiles"), [((9, 0), HopperTiles()), ((8, 0), tiles_for((8, 0)))], ids=["hopper", "ampere"])
def test_phases_and_shares_of_the_forward(cc, tiles, monkeypatch):
    monkeypatch.setattr(gpu, "current", lambda: gpu.Gpu(cc, 132))
    for V, D in ((256_000, 2304), (131_072, 4096), (5000, 64)):
        found = set()
        for N in TOKENS:
            layout = Layout.of(problem(N, V, D, batch_invariant=True), tiles)
            assert layout.fixed
            assert layout.phases(True) == layout.phases(False)
            assert layout.workers // layout.per_round >= layout.workers // 3
            assert layout.batch % (layout.per_round * tiles.group_n) == 0, "launches are of whole rounds"
            found.add((layout.workers, layout.per_round, tuple(layout.phases(False))))
        assert len(found) == 1
    assert not Layout.of(problem(300, 5000, 64), tiles).fixed


@pytest.mark.parametrize(("V", "D"), [(256_000, 2304), (700, 64)])
def test_rounds_of_the_backward(V, D):
    """The rounds' sums of products are added up, so rounds are the same for all batches; and they fit into their buffers."""
    for N in TOKENS:
        p = problem(N, V, D, batch_invariant=True)
        layout = workspace.layout_of(p, Gradients(e=p.e), 2**30)
        assert layout.fixed_tiles == workspace.FIXED_ROUND_TILES == 12
        assert layout.borrowed_slots == 0
        columns = min(12, layout.survey.column_tiles) * 128
        assert layout.large_slots >= layout.blocks * columns
        assert layout.survey.rounds_max >= -(-layout.survey.column_tiles // 12)
        assert workspace.layout_of(p, Gradients(c=p.c), 2**30).fixed_tiles == 0, "dC is no token's own"
        assert workspace.layout_of(problem(N, V, D), Gradients(e=p.e), 2**30).fixed_tiles == 0


@pytest.mark.parametrize("accumulates", [False, True])
@pytest.mark.parametrize("K", [None, 2])
def test_float16_is_scaled_by_token(K, accumulates, monkeypatch):
    """What is computed of a token has weights whose largest is in [1, 2), and its row is scaled back, to the bit."""
    rng, N, D = np.random.default_rng(0), 40, 8
    monkeypatch.setattr(passes.matrices, "aligned", lambda matrix: matrix)
    options = Options.of(np.dtype(np.float16), {"batch_invariant": True, "entropy": True})
    shape = (N,) if K is None else (N, K)
    softmax, entropy = (rng.normal(size=(2, N)) * 2.0 ** rng.integers(-20, 20, N)).astype(np.float32)
    target = (rng.normal(size=shape) * 2.0 ** rng.integers(-20, 20, shape)).astype(np.float32)
    softmax[:3], target[:3], entropy[:3] = 0, 0, 0
    softmax[4], target[5] = np.nan, np.inf
    p = SimpleNamespace(N=N, D=D, K=K, dtype=np.dtype(np.float16), options=options, xp=np, e=None, c=None, class_weights=None)
    given, calls = Weights(softmax, target, entropy=entropy), []

    def make(call, into, keep_all):
        assert keep_all
        calls.append((call, into))
        if into.e is not None:
            assert into.e.dtype == np.float32
            assert not call.adds
            into.e[:] = call.weights.softmax[:, None] * np.arange(1, D + 1)

    d_e = rng.normal(size=(N, D)).astype(np.float16) if accumulates else np.zeros((N, D), np.float16)
    with np.errstate(all="ignore"):
        expected = d_e.astype(np.float32) + softmax[:, None] * np.arange(1, D + 1, dtype=np.float32)
        statistics = Statistics(*[None] * 6, survivors=None, survivor_block=128)
        passes.in_passes(p, statistics, given, Gradients(e=d_e, c=np.zeros((5, D), np.float16)), accumulates, make)
        np.testing.assert_array_equal(d_e, expected.astype(np.float16))
    (of_e, _), (of_c, into_c) = calls
    assert into_c.e is None
    assert of_c.weights is given
    assert of_c.adds == accumulates
    scaled = of_e.weights
    targets = abs(scaled.target) if K is None else abs(scaled.target).sum(axis=1)
    largest = np.maximum(np.maximum(abs(scaled.softmax), abs(scaled.entropy)), targets)
    finite = np.isfinite(softmax) & np.isfinite(targets)
    assert ((largest[finite] >= 1) & (largest[finite] < 2))[3:].all()
