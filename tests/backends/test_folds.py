"""A fold that is added: here two are, in every backend that has folds, by what CONTRIBUTING.md says and nothing else.

`Smallest` has a state of its own: the smallest logit, and which entry has it. `Expected` builds on the first fold: it is the
mean logit under the softmax. Both run beside the package's own folds and are judged against stored logits.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numba import cuda

from cce_numba import folds
from cce_numba.cpu import folds as cpu_folds
from cce_numba.simt import folds as simt_folds
from cce_numba.simt.folds.fold import Functions
from cce_numba.simt.product import make_product
from tests.helpers import harness as harness_module
from tests.helpers import offline
from tests.helpers.cases import DTYPES, cases, make_case
from tests.helpers.checks import assert_within, compute_unit, expect

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


# ---- cpu


class CpuSmallest:
    name: ClassVar[str] = "smallest"

    class State(NamedTuple):
        smallest: Any  # (n_valid,) float64
        entry: Any  # (n_valid,) int64

    def begin(self, given):
        n_valid = len(given.tokens)
        return self.State(np.full(n_valid, np.inf), np.full(n_valid, -1))

    def step(self, state, first_state, tile):
        entry = tile.logits.argmin(axis=1)
        smallest = np.take_along_axis(tile.logits, entry[:, None], axis=1)[:, 0]
        smaller = smallest < state.smallest[tile.rows]
        state.smallest[tile.rows][smaller] = smallest[smaller]
        state.entry[tile.rows][smaller] = tile.columns.start + entry[smaller]

    def merge(self, state, later):
        smaller = later.smallest < state.smallest
        return self.State(*(np.where(smaller, b, a) for a, b in zip(state, later, strict=True)))

    def store(self, state, first_state, given):
        smallest, entry = np.zeros(given.problem.N, given.problem.compute_dtype), np.zeros(given.problem.N, np.int64)
        smallest[given.tokens], entry[given.tokens] = state
        return {"smallest": smallest, "smallest_entry": entry}


class CpuExpected:
    name: ClassVar[str] = "expected"

    class State(NamedTuple):
        shift: Any  # (n_valid,) float64
        total: Any  # (n_valid,) float64: of logit * exp(logit - shift)

    def begin(self, given):
        n_valid = len(given.tokens)
        return self.State(np.zeros(n_valid), np.zeros(n_valid))

    def step(self, state, first_state, tile):
        z, shift = tile.logits.astype(np.float64), first_state.largest[tile.rows]
        state.total[tile.rows] *= np.exp(state.shift[tile.rows] - shift)
        state.total[tile.rows] += (z * np.exp(z - shift[:, None])).sum(axis=1)
        state.shift[tile.rows] = shift

    def merge(self, state, later):
        shift = np.maximum(state.shift, later.shift)
        return self.State(shift, sum(part.total * np.exp(part.shift - shift) for part in (state, later)))

    def store(self, state, first_state, given):
        expected = np.zeros(given.problem.N, given.problem.compute_dtype)
        expected[given.tokens] = state.total / first_state.sum
        return {"expected": expected}


# ---- simt


class SmallestState(NamedTuple):
    smallest: Any  # (block_n,) real, in shared memory
    entry: Any  # (block_n,) int64
    entries: Any  # (threads_v, block_n) int64: of what each thread of a row has in `Tile.partial`


class SmallestRow(NamedTuple):
    smallest: Any  # real
    entry: Any  # int64


class SmallestArrays(NamedTuple):
    smallest: Any  # (N,) real
    entry: Any  # (N,) int64


@dataclass(frozen=True)
class SimtSmallest:
    name: ClassVar[str] = "smallest"
    Row: ClassVar[Any] = SmallestRow

    def row_dtypes(self, real):
        return real, np.dtype(np.int64)

    def arrays(self, given):
        p = given.problem
        return SmallestArrays(p.xp.zeros(p.N, p.compute_dtype), p.xp.zeros(p.N, np.int64))

    def results(self, arrays):
        return {"smallest": arrays.smallest, "smallest_entry": arrays.entry}

    def functions(self, tiles, real):
        block_n, threads, threads_v, thread_n, thread_v = (
            tiles.block_n,
            tiles.threads,
            tiles.threads_v,
            tiles.thread_n,
            tiles.thread_v,
        )
        infinity, column_of, shape, real_ = (
            real.type(math.inf),
            make_product(tiles, real.type).column_of,
            (threads_v, block_n),
            real.type,
        )

        @cuda.jit(device=True)
        def begin(arrays, first_arrays, block):
            smallest = cuda.shared.array(block_n, real_)
            entry = cuda.shared.array(block_n, np.int64)
            entries = cuda.shared.array(shape, np.int64)
            for r in range(cuda.threadIdx.y * threads_v + cuda.threadIdx.x, block_n, threads):
                smallest[r], entry[r] = infinity, -1
            return SmallestState(smallest, entry, entries)

        @cuda.jit(device=True)
        def step(state, first_state, arrays, tile):
            x, y = cuda.threadIdx.x, cuda.threadIdx.y
            for i in range(thread_n):
                smallest, entry = infinity, -1
                for j in range(thread_v):
                    v = tile.v0 + column_of(j)
                    if v < tile.V and tile.logits[i, j] < smallest:
                        smallest, entry = tile.logits[i, j], v
                tile.partial[x, y * thread_n + i] = smallest
                state.entries[x, y * thread_n + i] = entry
            cuda.syncthreads()
            for r in range(y * threads_v + x, block_n, threads):
                for other in range(threads_v):
                    if tile.partial[other, r] < state.smallest[r]:
                        state.smallest[r], state.entry[r] = tile.partial[other, r], state.entries[other, r]
            cuda.syncthreads()

        @cuda.jit(device=True)
        def row(state, r):
            return SmallestRow(state.smallest[r], state.entry[r])

        @cuda.jit(device=True)
        def merge(row, later):
            return later if later.smallest < row.smallest else row

        @cuda.jit(device=True)
        def store(row, first_row, arrays, place):
            if place.exists:
                arrays.smallest[place.token], arrays.entry[place.token] = row.smallest, row.entry

        return Functions(begin, step, row, merge, store)


class ExpectedState(NamedTuple):
    shift: Any  # (block_n,) real, in shared memory
    total: Any  # (block_n,) real: of logit * exp(logit - shift)


class ExpectedRow(NamedTuple):
    shift: Any
    total: Any


class ExpectedArrays(NamedTuple):
    expected: Any  # (N,) real


@dataclass(frozen=True)
class SimtExpected:
    name: ClassVar[str] = "expected"
    Row: ClassVar[Any] = ExpectedRow

    def row_dtypes(self, real):
        return real, real

    def arrays(self, given):
        return ExpectedArrays(given.problem.xp.zeros(given.problem.N, given.problem.compute_dtype))

    def results(self, arrays):
        return {"expected": arrays.expected}

    def functions(self, tiles, real):
        block_n, threads, threads_v, thread_n, thread_v = (
            tiles.block_n,
            tiles.threads,
            tiles.threads_v,
            tiles.thread_n,
            tiles.thread_v,
        )
        zero, column_of, real_ = real.type(0), make_product(tiles, real.type).column_of, real.type

        @cuda.jit(device=True)
        def begin(arrays, first_arrays, block):
            shift = cuda.shared.array(block_n, real_)
            total = cuda.shared.array(block_n, real_)
            for r in range(cuda.threadIdx.y * threads_v + cuda.threadIdx.x, block_n, threads):
                shift[r], total[r] = zero, zero
            return ExpectedState(shift, total)

        @cuda.jit(device=True)
        def step(state, first_state, arrays, tile):
            x, y = cuda.threadIdx.x, cuda.threadIdx.y
            for i in range(thread_n):
                shift, total = first_state.largest[y * thread_n + i], zero
                for j in range(thread_v):
                    if tile.v0 + column_of(j) < tile.V:
                        z = tile.logits[i, j]
                        total += z * real_(math.exp(z - shift))
                tile.partial[x, y * thread_n + i] = total
            cuda.syncthreads()
            for r in range(y * threads_v + x, block_n, threads):
                total = state.total[r] * real_(math.exp(state.shift[r] - first_state.largest[r]))
                for other in range(threads_v):
                    total += tile.partial[other, r]
                state.shift[r], state.total[r] = first_state.largest[r], total
            cuda.syncthreads()

        @cuda.jit(device=True)
        def row(state, r):
            return ExpectedRow(state.shift[r], state.total[r])

        @cuda.jit(device=True)
        def merge(row, later):
            shift = max(row.shift, later.shift)
            total = row.total * real_(math.exp(row.shift - shift)) + later.total * real_(math.exp(later.shift - shift))
            return ExpectedRow(shift, total)

        @cuda.jit(device=True)
        def store(row, first_row, arrays, place):
            if place.exists:
                arrays.expected[place.token] = row.total / first_row.sum

        return Functions(begin, step, row, merge, store)


# ---- all of them; a backend that has folds has its line here


def folds_of(backend):
    """`(the folds that a backend knows, those that are added)`."""
    if backend in ("hopper", "ampere"):  # of which the simulator knows nothing, so it is imported where it is wanted
        from cce_numba.tensor_core.folds import FOLDS
        from tests.backends import tensor_core_folds

        return FOLDS, (tensor_core_folds.SMALLEST, tensor_core_folds.EXPECTED)
    portable = {
        "cpu": (cpu_folds.FOLDS, (CpuSmallest(), CpuExpected())),
        "simt": (simt_folds.FOLDS, (SimtSmallest(), SimtExpected())),
    }
    return portable[backend]


def results_of(backend):
    """What the added folds store. The fold of the tensor cores does not say which entry the smallest is."""
    return {"smallest", "expected"} | (set() if backend in ("hopper", "ampere") else {"smallest_entry"})


@pytest.fixture(scope="module")
def more_folds(harness):
    """The backend's forward runs the two folds as well, while the context is entered."""
    known, added = folds_of(harness.backend)
    return lambda patch: add_folds(patch, known, added)


def add_folds(patch, known, added):
    """The backend knows them, and every forward wants them."""
    wanted = folds.wanted
    for fold in added:
        patch.setitem(known, fold.name, fold)
    patch.setattr(folds, "wanted", lambda *asked: (*wanted(*asked), *(fold.name for fold in added)))


def check_folded(case, result, harness):
    """Of every token that counts what stored logits say; 0 for the others."""
    expected, statistics = expect(case), result._statistics
    folded = {name: harness.host(array) for name, array in statistics.folded.items()}
    assert set(folded) == results_of(harness.backend)
    tokens = harness.host(statistics.tokens)[: int(harness.host(statistics.n_valid))]
    z, unit, V = expected.forward.logits, compute_unit(case.e.dtype), len(case.c)
    error, largest = expected.z_error.max(axis=1, initial=0), np.abs(z).max(axis=1, initial=0)
    assert_within("smallest", folded["smallest"][tokens], z.min(axis=1, initial=np.inf), error)
    if "smallest_entry" in folded:
        entry = folded["smallest_entry"][tokens]
        assert_within("logit of the smallest entry", z[np.arange(len(z)), entry], z.min(axis=1, initial=np.inf), 2 * error)
    softmax = np.exp(z - expected.forward.lse[expected.valid][:, None])
    # A logit's error reaches it twice: by itself, and by its probability. Sums have some more terms than there are tiles.
    allowed = error + largest * (4 * error + (64 + V / 8) * unit * (1 + largest))
    assert_within("expected", folded["expected"][tokens], (softmax * z).sum(axis=1), allowed)
    for name, array in folded.items():
        others = np.delete(array, tokens)
        assert not others.any(), f"{name} of tokens that do not count"


@pytest.mark.usefixtures("compiler")
def test_added_folds_compile_for_a_gpu(monkeypatch):
    """The portable ones, as they would be launched; their state stays in registers and shared memory."""
    from cce_numba.commands.precompile import kernels_of

    known, added = folds_of("simt")
    add_folds(monkeypatch, known, added)
    _, kernels = kernels_of("simt", "float32", ["softcap"], (9, 0))
    kernels = [kernel for kernel in kernels if kernel.function.__name__ in ("lse_kernel", "finish_kernel")]
    assert len(kernels) == 4
    assert {kernel.identity for kernel in kernels} == {None}, "folds from elsewhere are in no digest of the package's sources"
    for kernel in kernels[:2]:
        compiled = offline.compile_launched(kernel)
        assert compiled.spilled_bytes <= 256
        assert compiled.count(r"call(\.uni)?") == 0


@pytest.mark.usefixtures("compiler")
def test_added_folds_compile_for_tensor_cores():
    """Beside the package's own; with their state in registers, of which few are left."""
    from cce_numba.hopper.forward.kernel import make_forward_kernel
    from cce_numba.hopper.tiles import HopperTiles
    from cce_numba.tensor_core.merge import make_merge_kernel

    known, added = folds_of("hopper")
    chosen = (*(known[own] for own in (folds.MAX_SUM, folds.TARGET_LOGIT, folds.SURVIVORS)), *added)
    kernel, merge = make_forward_kernel(HopperTiles(), DTYPES[1], None, False, False, chosen), make_merge_kernel(256, chosen)
    assert kernel.identity is merge.identity is None, "folds from elsewhere are in no digest of the package's sources"
    for compiled in map(offline.compile_hopper, (kernel, merge)):
        assert compiled.spilled_bytes <= 1024
        assert compiled.count(r"call(\.uni)?") == 0


def test_more_numbers_than_shared_memory_has_room_for_are_refused():
    """`HopperTiles.row_numbers` says how many of a row the consumers tell each other."""
    if harness_module.SimulatorHarness.is_active():
        pytest.skip("the simulator knows no tensor cores")
    from cce_numba.hopper.forward.kernel import make_forward_kernel
    from cce_numba.hopper.tiles import HopperTiles

    known, (_, expected) = folds_of("hopper")
    most = HopperTiles.row_numbers
    many = known[folds.MAX_SUM], *[expected] * ((most - 2) // 2)
    make_forward_kernel(HopperTiles(), DTYPES[1], None, False, False, many)
    with pytest.raises(ValueError, match=rf"folds: their workers tell each other {most + 2} numbers of a row, .* {most}"):
        make_forward_kernel(HopperTiles(), DTYPES[1], None, False, False, (*many, expected))


@given(data=st.data())
def test_added_folds_find_what_stored_logits_say(harness, edges, more_folds, data):
    """Ragged sizes, ignored tokens, shifts, bias, scale and softcap; with survivors, for which splits go in two phases."""
    case = data.draw(cases(edges, [dtype for dtype in DTYPES[1:3] if dtype in edges.dtypes]))
    if data.draw(st.booleans(), label="scale"):
        case = case.with_options(logit_scale=np.random.default_rng(0).uniform(0.25, 1.5, case.targets.shape))
    with pytest.MonkeyPatch.context() as patch:
        more_folds(patch)
        check_folded(case, harness.forward(case), harness)


@pytest.mark.parametrize("smoothing", [0.0, 0.1], ids=["survivors", "mean logit"])
def test_of_many_splits_and_beside_the_others(harness, edges, more_folds, smoothing):
    """Of a vocabulary of many tiles; what the package's own folds find stays the same, to the bit."""
    options = {"softcap": 8.0, "label_smoothing": smoothing, "bias": True, "ignored": 0.3}
    case = make_case(3, (edges.n[-1] + 1,), edges.long_v, edges.d[-1] + 1, edges.dtype, **options)
    alone = harness.forward(case)._statistics
    with pytest.MonkeyPatch.context() as patch:
        more_folds(patch)
        if harness.backend == "simt":
            from cce_numba.simt import forward

            patch.setattr(forward, "count_splits", lambda n_blocks, v_tiles, invariant: min(v_tiles, 5))
        result = harness.forward(case)
        check_folded(case, result, harness)
    with pytest.MonkeyPatch.context() as patch:
        more_folds(patch)
        together = harness.forward(case)._statistics
    for field in dataclasses.fields(alone):
        ours, theirs = getattr(together, field.name), getattr(alone, field.name)
        if field.name == "folded":
            assert set(ours) == results_of(harness.backend)
            assert not theirs
        elif isinstance(theirs, int) or theirs is None:
            assert ours == theirs
        elif field.name != "tokens":
            np.testing.assert_array_equal(harness.host(ours), harness.host(theirs), err_msg=field.name)
