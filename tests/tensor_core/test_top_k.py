"""The best entries out of the maxima of groups: groups are a lane's columns, and the kernel, run in Python by one thread."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import offline
from tests.helpers.harness import SimulatorHarness

if SimulatorHarness.is_active():
    pytest.skip("the simulator has none of these kernels", allow_module_level=True)

from numba import cuda

from cce_numba import gpu
from cce_numba.ampere import backend as ampere_backend
from cce_numba.ampere.tiles import tiles_for
from cce_numba.hopper import backend as hopper_backend
from cce_numba.hopper.tiles import HopperTiles
from cce_numba.interchange import BFLOAT16
from cce_numba.options import Options
from cce_numba.ptx import arithmetic, memory
from cce_numba.tensor_core import fragment, top_k
from cce_numba.tensor_core.folds.group_maxima import GROUP_BYTES, GROUPS, entry_of
from cce_numba.tensor_core.layout import Layout
from cce_numba.tensor_core.records import GroupMaxima, LogitTerms, Matrix, Tokens
from cce_numba.tensor_core.sums import warp_sum
from tests.ampere.backward.test_plan_of_work import Machine, Plain
from tests.hopper.forward.test_layout import Problem

FLOAT16, FLOAT32 = np.dtype(np.float16), np.dtype(np.float32)
WIDTHS = (32, 64, 192)  # columns of a tile that folds see: of ampere's two kinds of tiles, of hopper's


@pytest.mark.parametrize("n", WIDTHS)
def test_groups_are_the_columns_of_a_lane(n):
    """In the order of the fragment, whose element i of a row is column 2 * (i // 4) + (i & 1) of the lane."""
    tile, seen = 5, []
    for lane in range(4):
        of_row = [i for i in range(n // 2) if fragment.row_of(i) == 1]
        assert [2 * (i // 4) + (i & 1) for i in of_row] == list(range(n // 4))
        columns = [tile * n + 2 * lane + fragment.column_of(i) for i in of_row]
        assert [entry_of(tile * GROUPS + lane, i, n) for i in range(n // 4)] == columns
        seen += columns
    assert sorted(seen) == list(range(tile * n, tile * n + n))


def added(array, i, x):
    """As `cuda.atomic.add`, which returns what was there."""
    was = array[i]
    array[i] += x
    return was


class Gpu(Machine):
    """Of one thread, which is a CTA: barriers are nothing, and it has all numbers of a row where D is 1."""

    def instructions(self):
        return super().instructions() | {
            memory.load_global_f32: lambda address: self.bytes_at(address, 4).view(np.float32)[0],
            memory.load_global_i32: lambda address: self.bytes_at(address, 4).view(np.int32)[0],
            memory.load_global_u16: lambda address: np.uint32(self.bytes_at(address, 2).view(np.uint16)[0]),
            arithmetic.bits_of_float: lambda x: np.float32(x).view(np.uint32),
            arithmetic.maximum: np.fmax,
            arithmetic.float_of_bits: lambda bits: np.uint32(bits).view(np.float32),
            arithmetic.widen_f16: lambda bits: np.float32(np.uint16(bits).view(np.float16)),
        }

    def function(self, x):
        plain = Plain(self)
        fake = plain.known[id(cuda)]
        fake.threadIdx, fake.blockDim, fake.blockIdx = (SimpleNamespace(x=x) for x in (0, 1, 0))
        fake.syncthreads, fake.syncthreads_or = lambda: None, bool
        fake.shared = SimpleNamespace(array=lambda shape, dtype: np.zeros(shape, dtype))
        fake.atomic = SimpleNamespace(add=added)
        plain.known[id(warp_sum)] = lambda x: x
        return plain(x), fake


@contextlib.contextmanager
def few_stripes():
    """So that groups share stripes, chunks are many, and candidates are put in order now and then."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(top_k, "_STRIPES", 16)
        patch.setattr(top_k, "_CHUNK", 10)
        patch.setattr(top_k, "_ROOM", 70)
        yield


@given(data=st.data())
def test_a_lower_bound(data):
    """At least k groups reach it; it is the k-th largest of the stripes', so it is the groups' where each has a stripe."""
    numbers = st.floats(width=32, allow_nan=False) | st.sampled_from([0.0, -np.inf, 1.0, -1.0])
    x = np.array(data.draw(st.lists(numbers, min_size=1, max_size=60)), np.float32)
    k = data.draw(st.integers(1, min(len(x), 16)), label="k")
    machine = Gpu()
    with few_stripes():
        find, _ = machine.function(top_k.lower_bound)
        found = find(machine.at(x), np.int32(len(x)), np.int32(k), np.zeros(16, np.float32), np.zeros(1, np.float32))
    assert (x >= found).sum() >= k
    stripes = [x[i::16].max() for i in range(min(16, len(x)))]
    assert found == np.sort(stripes)[::-1][k - 1]


@given(data=st.data())
def test_the_best_are_found(data):
    """With ties, whose order is that of entries; logits that the forward has rounded otherwise; fewer groups than entries."""
    n, V, k = data.draw(st.sampled_from(WIDTHS), label="n"), data.draw(st.integers(1, 450), label="V"), None
    k = data.draw(st.integers(1, min(V, 12)), label="k")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**16), label="seed"))
    many = data.draw(st.booleans(), label="many ties")
    z = (rng.integers(-3, 4, V) if many else rng.normal(size=V) * 10).astype(np.float16)
    tiles = -(-V // n)
    padded = np.full(tiles * n, -np.inf, np.float32)
    padded[:V] = z * (1 + np.float32(0 if many else 2.0**-20) * rng.integers(-1, 2, V))  # as the forward has it
    members = padded[[[entry_of(g, i, n) for i in range(n // 4)] for g in range(tiles * GROUPS)]]
    best, second = np.sort(members, axis=1)[:, :-3:-1].T.copy()
    others = np.stack([second, members.argmax(axis=1).astype(np.int32).view(np.float32)], axis=1)
    machine, token = Gpu(), 2
    kernel = top_k.make_best_kernel(n, FLOAT16, None, False, False)
    with few_stripes():
        run, _ = machine.function(kernel.function)
    e, c, listed = np.ones((4, 1), np.float16), z[:, None].copy(), np.array([token], np.int32)
    log_sum, logits, ids = np.zeros(4, np.float32), np.full((4, k), np.nan, np.float32), np.full((4, k), -1)
    tokens = Tokens(machine.at(listed), np.array([1]), 0, 1)
    terms = LogitTerms(*(0,) * len(LogitTerms.declared))
    rows = Matrix(machine.at(e), 2), Matrix(machine.at(c), 2), 2
    with np.errstate(all="ignore"):
        of_groups, results = GroupMaxima(machine.at(best), machine.at(others), len(best)), (logits.reshape(-1), ids.reshape(-1))
        run(*rows, terms, tokens, of_groups, log_sum, V, 1, k, *results)
    found, values = ids[token], logits[token]
    assert (ids[[0, 1, 3]] == -1).all(), "rows of no listed token stay"
    assert len(set(found.tolist())) == k
    assert values[0] == padded.max()
    assert (values[1:] <= values[:-1]).all()
    assert ((values[1:] < values[:-1]) | (found[1:] > found[:-1])).all()
    np.testing.assert_allclose(z[found].astype(np.float32), np.sort(z.astype(np.float32))[::-1][:k], atol=1e-4)
    by_hand = np.lexsort((np.arange(V), -padded[:V].astype(np.float64)))[:k]
    # No group gives two: all logits are those of the tiles.
    if many or (len(best) >= k and (second < np.sort([best[i::16].max(initial=-np.inf) for i in range(16)])[-k]).all()):
        np.testing.assert_array_equal(values, padded[by_hand])
        np.testing.assert_array_equal(found, by_hand)


def test_a_lost_token_has_entries_that_are_there():
    """Whatever their logits are: its log-sum-exp makes NaN of all probabilities. Nothing is computed for it."""
    machine = Gpu()
    run, _ = machine.function(top_k.make_best_kernel(64, FLOAT16, None, False, False).function)
    logits, ids, listed = np.full(3, np.nan, np.float32), np.full(3, -1), np.zeros(1, np.int32)
    tokens, nowhere = Tokens(machine.at(listed), np.array([1]), 0, 1), Matrix(0, 0)
    run(nowhere, nowhere, 0, None, tokens, GroupMaxima(0, 0, 4), np.array([np.nan], np.float32), 50, 1, 3, logits, ids)
    assert ids.tolist() == [0, 1, 2]
    assert np.isfinite(logits).all()


@pytest.mark.parametrize(("cc", "tiles"), [((9, 0), HopperTiles()), ((8, 0), tiles_for((8, 0)))], ids=["hopper", "ampere"])
def test_maxima_take_bounded_memory_and_batches_go_one_after_the_other(cc, tiles, monkeypatch):
    monkeypatch.setattr(gpu, "current", lambda: gpu.Gpu(cc, 132))
    p = Problem(100_000, 256_000, 2304)
    p.options = Options.of(BFLOAT16, {"top_k": 8})
    layout = Layout.of(p, tiles)
    assert layout.groups == layout.n_tiles * tiles.block_v // tiles.fold_v * GROUPS
    assert 2**26 < layout.best_bytes == GROUP_BYTES * layout.rows * layout.groups <= 2**27
    assert layout.rows == layout.batch
    launches = layout.launches(True)
    assert sorted(launches) == sorted((phase, batch) for phase in layout.phases(True) for batch in layout.batches())
    assert [batch for _, batch in launches] == sorted(batch for _, batch in launches)
    p.options = Options.of(BFLOAT16, {})
    without = Layout.of(p, tiles)
    assert without.best_bytes == 0
    assert [phase for phase, _ in without.launches(True)] == sorted(phase for phase, _ in without.launches(True))


@pytest.mark.parametrize("module", [hopper_backend, ampere_backend])
def test_more_than_there_is_room_for(module, monkeypatch):
    """Go to a backend that has it."""
    assert module.MOST_BEST == top_k.MOST
    monkeypatch.setattr(module.gpu, "why_not", lambda on_device: None)
    monkeypatch.setattr(gpu, "current", lambda: gpu.Gpu((9, 0), 132))
    for k, refused in ((64, False), (65, True)):
        p = SimpleNamespace(N=1, V=100, D=1, on_device=True, dtype=BFLOAT16, options=Options.of(BFLOAT16, {"top_k": k}))
        reason = module.why_not(p)
        assert (reason is not None and "up to 64 best entries, and top_k is 65" in reason) == refused


# ---- compiled for a real GPU without one


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("bias", [None, FLOAT32], ids=str)
def test_the_kernel_that_finds_them(bias):
    compiled = offline.compile_launched(top_k.make_best_kernel(192, BFLOAT16, bias, bias is None, bias is not None), (8, 0))
    assert compiled.spilled_bytes == compiled.stack_bytes == 0
    assert compiled.registers <= 80, "three CTAs on a multiprocessor"
    assert compiled.count(r"call(\.uni)?") == 0
