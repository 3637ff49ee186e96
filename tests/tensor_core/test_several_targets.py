"""Several targets of a token in the backward: where they stand in G, and what is written there, run in Python thread by thread.

The tables are those of the survey's model (`test_survey`), the kernels' own functions run as plain Python. And all that is
compiled for several targets: what it costs beside what is compiled for one.
"""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from tests.helpers import offline
from tests.helpers.harness import SimulatorHarness

if SimulatorHarness.is_active():
    pytest.skip("the simulator has none of these kernels", allow_module_level=True)

from numba import cuda

from cce_numba.hopper.backward.kernel import make_backward_kernel
from cce_numba.hopper.backward.tiles import BackwardTiles
from cce_numba.interchange import BFLOAT16
from cce_numba.ptx import arithmetic, control, memory
from cce_numba.tensor_core.backward import several
from cce_numba.tensor_core.backward.form import GradientForm
from cce_numba.tensor_core.draws import make_draw_seed_kernel
from cce_numba.tensor_core.folds import several_targets
from cce_numba.tensor_core.fragment import column_of, row_of
from cce_numba.tensor_core.indexed_dot import make_indexed_dot_kernel
from cce_numba.tensor_core.records import LogitTerms, PlacedTargets, SeveralTargets
from cce_numba.tensor_core.survey.tables import SurveyLayout, Tables
from cce_numba.tensor_core.tokens import make_list_tokens_kernel
from tests.ampere.backward.test_plan_of_work import Machine, Plain
from tests.tensor_core.test_survey import make_inputs, model

N, V, K, PADDING = 300, 700, 3, -100
FLOAT16 = np.dtype(np.float16)


class Gpu(Machine):
    """With the instructions that write targets."""

    def add(self, address, number):
        self.bytes_at(address, 8).view(np.int64)[0] += number

    def store(self, dtype):
        return lambda address, value: self.bytes_at(address, dtype().itemsize).view(dtype).fill(value)

    def store_half(self, address, value):
        self.bytes_at(address, 2).view(np.uint16).fill(int(value) & 0xFFFF)

    def instructions(self):
        return super().instructions() | {
            memory.load_global_i32: lambda address: self.bytes_at(address, 4).view(np.int32)[0],
            memory.load_global_f32: lambda address: self.bytes_at(address, 4).view(np.float32)[0],
            memory.store_global_f32: self.store(np.float32),
            memory.store_global_u16: self.store_half,
            memory.add_global_s64: self.add,
            memory.store_shared_f32: lambda address, value: self.store_shared(address, np.float32(value).view(np.int32)),
            arithmetic.opaque_i32: lambda x: x,
            arithmetic.exp2: np.exp2,
            arithmetic.fma: lambda x, y, z: np.float32(np.float64(x) * np.float64(y) + np.float64(z)),
            arithmetic.pack_f16: lambda x, y: np.array([x, y], np.float16).view(np.uint32)[0],
        }

    def threads(self, kernel, count, *values):
        """All threads of a launch with a thread for each of so many things, one after the other."""
        plain = Plain(self)
        function, grid = plain(kernel.function), plain.known[id(cuda)]
        for i in range(-(-count // several.THREADS) * several.THREADS):
            grid.blockIdx, grid.threadIdx = (SimpleNamespace(x=x) for x in divmod(i, several.THREADS))
            function(*values)


@pytest.fixture(scope="module", params=[0.4, None], ids=["filtered", "exact"])
def placed(request):
    """Tokens without weight, rounds of several tiles, equal targets, padding, targets out of range."""
    x = make_inputs(1, N, V, density=request.param, listed=0.9, dead=0.2, dense_share=1.0)
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(N, K)).astype(np.float32) / N * (x.target_weight != 0)[:, None]
    x = replace(x, log_sum=abs(x.log_sum), target_weight=abs(weights).sum(1))
    ids = rng.integers(0, V, (N, K))
    ids[::5, 2] = ids[::5, 0]
    ids[::7, 1] = PADDING
    ids[::11, 1] = V
    if x.survivors is not None:
        for position, n in enumerate(x.tokens):
            x.survivors[position // 128, ids[n][(ids[n] >= 0) & (ids[n] < V)]] = True
    layout = SurveyLayout(N, V, cap=512, dense_cap=512, large_cap=512)
    found = model(layout, x)
    machine = Gpu()
    tables = Tables(**{name: found[name].reshape(-1) if name in found else None for name in Tables.declared})
    logits = x.max_logit[:, None] - abs(rng.normal(size=(N, K))).astype(np.float32)
    places = layout.blocks * several.AT_ONCE * 128
    arrays = np.full((4, places), 0x7F7F7F7F, np.int32)
    rows = list(arrays)
    targets = SeveralTargets(ids.reshape(-1), K, PADDING, logits.reshape(-1))
    record = PlacedTargets(*(machine.at(row) for row in rows), np.int32(several.AT_ONCE))
    column_of, bias_sums = np.full(V, -9, np.int32), np.zeros(V, np.int64)
    machine.threads(several.make_invert_kernel(), layout.column_tiles * 128, layout.sizes, tables, column_of)
    given = targets, weights.reshape(-1), column_of, 0.0, layout.sizes, tables, record, machine.at(bias_sums)
    machine.threads(several.make_place_kernel(False), places, *given)
    return SimpleNamespace(
        x=x, layout=layout, found=found, machine=machine, tables=tables, ids=ids, weights=weights, logits=logits,
        record=record, arrays=arrays.reshape(4, layout.blocks, several.AT_ONCE, 128), bias_sums=bias_sums,
    )  # fmt: skip


def totals(placed, n):
    """{entry: (weight, logit)} of a token's targets."""
    result = {}
    for v, weight, z in zip(placed.ids[n], placed.weights[n], placed.logits[n], strict=True):
        if v != PADDING and 0 <= v < V:
            result[int(v)] = result.get(int(v), (0, z))[0] + weight, result.get(int(v), (0, z))[1]
    return result


def listed_columns(placed, block):
    """The vocabulary entries that survive in the block, in the order of the sorted columns."""
    bits = np.unpackbits(placed.found["bits"][block].view(np.uint8), bitorder="little").astype(bool)
    return placed.found["order"][bits]


def test_each_target_has_its_place(placed):
    scale, sums = placed.found["weight_scale"][0], np.zeros(V)
    for block in range(placed.layout.blocks):
        columns = {int(v): i for i, v in enumerate(listed_columns(placed, block))}
        for row in range(128):
            n = placed.found["row_of"][128 * block + row]
            wanted = totals(placed, n) if n >= 0 else {}
            ordinals, entries = placed.arrays[:2, block, :, row]
            weights, logits = placed.arrays[2:, block, :, row].view(np.float32)
            found = {int(v): (i, w, z) for i, v, w, z in zip(ordinals, entries, weights, logits, strict=True) if i >= 0}
            assert set(found) == set(wanted)
            for v, (total, z) in wanted.items():
                assert found[v][0] == columns[v]
                assert found[v][1] == pytest.approx(total * scale, rel=1e-6, abs=1e-2)
                assert found[v][2] == z
                sums[v] += total * scale
            assert (ordinals == -1).sum() == several.AT_ONCE - len(wanted)
    np.testing.assert_allclose(placed.bias_sums * several.BIAS_UNIT, sums, rtol=1e-6, atol=1e-2)
    assert (placed.bias_sums != 0).sum() > V / 4


def jobs_of(placed):
    """`(block, the job's columns, its first ordinal)` of each job that computes G, through all rounds."""
    first_tile, before = placed.found["first_tile"], placed.found["before"]
    dims = SimpleNamespace(column_tiles=placed.layout.column_tiles)
    plain = Plain(placed.machine)
    for r in range(int(placed.found["n_rounds"][0])):
        for block in range(placed.layout.blocks):
            start, end = before[block, first_tile[r]], before[block, first_tile[r + 1]]
            for skipped in range(0, end - start, 192):
                columns = listed_columns(placed, block)[start + skipped : min(end, start + skipped + 192)]
                first = plain(several.first_ordinal)(np.int32(block), np.int32(r), np.int32(skipped), placed.tables, dims)
                assert first == start + skipped
                yield block, columns, first


def test_they_are_written_over_what_is_there(placed):
    """Each once, in the job that has its column, and nothing else; and marked in the maxima of its 16 tokens."""
    machine, found = placed.machine, placed.found
    plain = Plain(machine)
    write = plain(several.make_write_targets(FLOAT16, False, False, False))
    mark = plain(several.make_mark_targets(192))
    terms, written, maxima_smem = LogitTerms(*(0,) * len(LogitTerms.declared)), 0, np.uint32(1024)
    rows = found["rows"]
    for block, columns, first in jobs_of(placed):
        machine.smem[:768].view(np.int32)[:] = np.pad(columns, (0, 192 - len(columns)), constant_values=-1)
        maxima = machine.smem[1024 : 1024 + 4 * 8 * 192].view(np.float32)
        maxima[:] = 0
        job, g = several.JobColumns(np.uint32(0), first, np.int32(block)), np.zeros((192, 128), np.float16)
        for row in range(128):
            write(job, np.int32(row), machine.at(g), terms, placed.tables, placed.record)
            mark(job, np.int32(row), maxima_smem, placed.record)
        expected, marks = np.zeros((192, 128)), np.zeros((8, 192), bool)
        for row in range(128):
            n = found["row_of"][128 * block + row]
            softmax, _, shift, _ = rows[128 * block + row]
            for v, (total, z) in (totals(placed, n) if n >= 0 else {}).items():
                for column in np.flatnonzero(columns == v):
                    p = softmax * 2.0 ** (z * math.log2(math.e) - shift)
                    expected[column, row] = p - total * found["weight_scale"][0]
                    marks[row // 16, column] = True
        np.testing.assert_allclose(g.astype(np.float64), expected, rtol=2e-3, atol=1e-2)
        np.testing.assert_array_equal(np.isinf(maxima.reshape(8, 192)), marks)
        written += int((expected != 0).sum())
        machine.arrays.pop()
    assert written == sum(len(totals(placed, n)) for n in found["row_of"] if n >= 0) > 400


# ---- the forward


class Lanes:
    """What lanes of a warp tell each other, each of them a thread of Python."""

    def __init__(self):
        self.meet, self.told = threading.Barrier(32), [None] * 32
        self.own = threading.local()

    def exchange(self, value):
        self.told[self.own.lane] = value
        self.meet.wait()
        everything = list(self.told)
        self.meet.wait()
        return everything

    def run(self, function):
        """By all lanes, function(lane)."""

        def lane_of(lane):
            self.own.lane = lane
            try:
                function(lane)
            except BaseException:
                self.meet.abort()
                raise

        with ThreadPoolExecutor(32) as pool:
            list(pool.map(lane_of, range(32)))


@pytest.mark.parametrize(("n", "several_k"), [(192, 1), (192, 6), (64, 5)])
def test_logits_leave_the_tile(n, several_k):
    """Each target's in the tile, of all rows of a warp, and no other; a row that is nobody's has none."""
    rng, lanes, machine = np.random.default_rng(0), Lanes(), Gpu()
    v_tile, tokens, half, warp = 3, 40, 1, 2
    last = (v_tile + 1) * n - 5  # the vocabulary ends within the tile
    ids = rng.integers(0, last + 40, (tokens, several_k))
    ids[::2, 0] = v_tile * n + rng.integers(0, n - 5, 20)  # of the tile
    ids[::3, -1] = PADDING
    rows = 64 * half + 16 * warp + np.arange(16)  # of the block
    token_of = rng.permutation(tokens)[:16].astype(np.int32)
    token_of[5] = -1
    machine.smem[:512].view(np.int32)[rows] = token_of
    z, logits = rng.normal(size=(16, n)).astype(np.float32), np.full((tokens, several_k), np.nan, np.float32)

    def pick(fragment, first, *columns):
        found = [np.float32(0)] * 2
        for i, value in enumerate(fragment):
            if columns[row_of(i)] - first == column_of(i):
                found[row_of(i)] = value
        return found

    plain = Plain(machine)
    plain.known[id(control.shuffle_i32)] = lambda value, lane: lanes.exchange(value)[lane]
    step = several_targets.make(n).step
    cells = dict(zip(step.py_func.__code__.co_freevars, step.py_func.__closure__, strict=True))
    plain.known[id(cells["pick"].cell_contents)] = pick
    fake = plain.known[id(cuda)]
    fake.any_sync = lambda mask, holds: any(lanes.exchange(holds))
    function = plain(step)
    found = SimpleNamespace(several=SeveralTargets(ids.reshape(-1), several_k, PADDING, logits.reshape(-1)))

    class Index:
        x = property(lambda self: 32 * warp + lanes.own.lane)

    fake.threadIdx = Index()

    def of_lane(lane):
        place = [(lane // 4 + 8 * row_of(i), 2 * (lane % 4) + column_of(i)) for i in range(n // 2)]
        tile = SimpleNamespace(
            thread=np.int32(32 * warp + lane), half=half, rows_smem=np.uint32(0), v_tile=v_tile, V=last, tokens=0
        )
        function((), [z[at] for at in place], tile, None, found, 0)

    lanes.run(of_lane)
    expected = np.full_like(logits, np.nan)
    for row, token in enumerate(token_of):
        for k in range(several_k):
            column = ids[token, k] - v_tile * n
            if token >= 0 and ids[token, k] != PADDING and 0 <= column < n and ids[token, k] < last:
                expected[token, k] = z[row, column]
    np.testing.assert_array_equal(logits, expected)
    assert np.isfinite(expected).sum() >= 4


# ---- compiled for a real GPU without one


@pytest.mark.usefixtures("compiler")
def test_the_backward():
    """Kernels with all options, and those of `ampere`, are compiled with several targets where they are compiled anyway."""
    kernel = make_backward_kernel(BackwardTiles(cluster=2), BFLOAT16, GradientForm(by_chance=True, several=True))
    compiled = offline.compile_launched(kernel)
    assert compiled.notices == []
    assert compiled.spilled_bytes <= 1400  # and 1224 where a token has one target
    assert compiled.count(r"(ld|st)\.local\S*") == 0, "no array has an index at run time"
    assert compiled.count(r"call(\.uni)?") == 0
    assert compiled.count(r"st\.global\.u16") == 1, "loops are not written out"


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(
    "kernel",
    [
        several.make_invert_kernel(),
        several.make_place_kernel(True),
        several.make_take_from_bias_kernel(),
        make_indexed_dot_kernel(BFLOAT16, np.dtype(np.float32), True, True, True),
        make_list_tokens_kernel(0, True),
        make_draw_seed_kernel(True),
    ],
    ids=lambda kernel: kernel.function.__name__,
)
def test_what_is_small(kernel):
    compiled = offline.compile_launched(kernel, (8, 0))
    assert compiled.spilled_bytes == compiled.stack_bytes == 0
    assert compiled.registers <= 65536 // kernel.threads
    not_sums_of_integers = r"(atom|red)\.(?!global\.or|relaxed\.gpu\.global\.add\.u64)\S*"
    assert compiled.count(not_sums_of_integers) == 0, "sums do not depend on the order"
