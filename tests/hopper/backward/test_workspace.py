"""How a backward is cut, by arithmetic alone: rounds that fit into their buffers, parts in a row, phases in order."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cce_numba import gpu
from cce_numba.interchange import BFLOAT16
from tests.helpers.harness import SimulatorHarness

if SimulatorHarness.is_active():
    pytest.skip("the simulator has none of these kernels", allow_module_level=True)

from cce_numba.hopper import tensor_map
from cce_numba.hopper.backward import scheduler
from cce_numba.hopper.backward import workspace as workspace_module
from cce_numba.hopper.backward.tiles import BUFFERS, LARGE_BUFFERS, PANEL, STAGING_BYTES, BackwardTiles
from cce_numba.hopper.backward.workspace import WorkspaceLayout
from cce_numba.hopper.tiles import MAX_SMEM_BYTES, HopperTiles
from cce_numba.ptx.wgmma import PANEL_BYTES
from cce_numba.tensor_core import matrices
from cce_numba.tensor_core.backward.lists import listed_place
from cce_numba.tensor_core.backward.partial_sums import SUMS_STEP
from cce_numba.tensor_core.backward.phases import is_of_products, phase_of_logits, phase_of_products, round_of
from cce_numba.tensor_core.survey.tables import COLUMN_TILE, K_STEP, LIST_TILE, tiles_of_dense_round
from tests.tensor_core.test_survey import make_inputs, model

MIB = 2**20

numbers = {
    "N": st.integers(1, 300_000),
    "V": st.integers(1, 300_000),
    "D": st.sampled_from([8, 64, 2304, 4096, 8192, 16_384]),
    "with_e": st.booleans(),
    "with_sums": st.booleans(),
}


# ---- memory


@given(**numbers)
def test_parts_lie_one_after_the_other(N, V, D, with_e, with_sums):
    w = WorkspaceLayout.of(N, V, D, with_e=with_e, with_sums=with_sums)
    slots, tiles_of_e = 3 * w.buffer_slots, -(-N // 128) * -(-D // 192)
    assert w.slots == slots
    least = {
        "maps": 4 * 128,
        "counters": 4 * (1 + 2 * w.survey.rounds_max + -(-N // 128)),
        "survey": w.survey.nbytes,
        "lists": 4 * slots,
        "g": 128 * 2 * slots,
        "sums": 8 * 4 * slots if with_sums else 0,
        "sums_e": 4 * 128 * 192 * tiles_of_e if with_e and w.survey.rounds_max > 1 else 0,
    }
    starts = [*w.offsets.values()]
    assert list(w.offsets) == [*least, "end"]
    assert all(start % 256 == 0 for start in starts)
    for size, start, end in zip(least.values(), starts, starts[1:], strict=False):
        assert start + size <= end < start + size + 256
    assert w.nbytes == w.offsets["end"]


@given(**numbers)
def test_memory_stays_within_its_share_where_it_can(N, V, D, with_e, with_sums):
    """Not where there is little for a share to be of, nor where blocks are so many that each has the least."""
    w = WorkspaceLayout.of(N, V, D, with_e=with_e, with_sums=with_sums)
    assert w.g_bytes <= 96 * MIB
    has_the_least = w.buffer_slots <= w.blocks * (3 * COLUMN_TILE + K_STEP)
    if w.g_bytes > 40 * MIB and not has_the_least:
        assert w.nbytes <= 0.115 * 2 * D * (N + V)
    if not has_the_least:
        assert w.slots * w.slot_bytes <= w.g_bytes


@pytest.mark.parametrize("c_bytes", [0, 2 * 256_000 * 2304])
def test_the_shape_that_everyone_measures(c_bytes):
    """Gemma 2 (2B), 8192 tokens: 1217 MB of gradients, of which the paper's own implementation takes as much again."""
    named = {"with_e": True, "with_sums": False, "c_bytes": c_bytes}
    w = WorkspaceLayout.of(8192, 256_000, 2304, **named)
    assert w.nbytes <= 0.115 * 2 * 2304 * (8192 + 256_000)
    assert w.g_bytes >= 40 * MIB
    assert w.sums_e_bytes == 4 * 8192 * 2304
    assert w is WorkspaceLayout.of(8192, 256_000, 2304, **named)


@given(**numbers)
def test_two_large_buffers_take_the_memory_of_three(N, V, D, with_e, with_sums):
    """Lists in them begin at multiples of a step, and they have room for what the survey may put there."""
    w = WorkspaceLayout.of(N, V, D, with_e=with_e, with_sums=with_sums)
    assert (BUFFERS, LARGE_BUFFERS) == (3, 2)
    assert w.slots - 2 * 64 < 2 * w.large_slots <= w.slots
    assert w.large_slots % 64 == w.buffer_slots % 64 == 0
    assert (w.survey.dense_cap, w.survey.large_cap) == (w.buffer_slots, w.large_slots)
    assert w.survey.cap <= w.survey.dense_cap <= w.survey.large_cap


# ---- memory that is borrowed


def borrowed_rounds(w, active_blocks):
    """Rounds of a dense survey that borrow memory, and the tiles of each."""
    tiles, more = (tiles_of_dense_round(cap, active_blocks) for cap in (w.survey.large_cap, w.survey.borrowed_cap))
    return (min(w.survey.borrowed_tiles, w.survey.column_tiles) // more if more > tiles else 0), more


@given(
    N=st.integers(1, 40_000),
    V=st.integers(1, 300_000),
    chunks=st.integers(1, 1024),
    itemsize=st.sampled_from([2, 4]),
    address=st.integers(2**20, 2**40),
    most=st.integers(1, 192 * MIB),
    mib=st.integers(0, 96),
    active=st.integers(0, 2**20),
)
@example(N=128, V=64_000, chunks=1, itemsize=2, address=2**20 + 1, most=192 * MIB, mib=0, active=0)  # no byte to spare
def test_borrowed_buffers_lie_in_memory_that_their_rounds_do_not_write(N, V, chunks, itemsize, address, most, mib, active):
    """Wherever dC's memory begins, of which 16 bytes are all that is known, and however few blocks are active."""
    row_bytes, c_address = 8 * chunks * itemsize, 16 * address
    c_bytes = V * row_bytes
    with mock.patch.object(workspace_module, "_BORROWED_BYTES", most):
        w = WorkspaceLayout(N, V, 8 * chunks, True, False, mib * MIB, c_bytes)
        active_blocks = 1 + active % w.blocks
        rounds, tiles = borrowed_rounds(w, active_blocks)
        begin, end = w.borrowed_at(c_address), w.borrowed_at(c_address) + w.borrowed_bytes
    assert begin % 256 == 0, "a tensor map and the swizzle's pattern"
    if w.borrowed_slots == 0:
        assert rounds == 0
        assert (w.survey.borrowed_cap, w.survey.borrowed_tiles) == (0, 0)
        return
    assert c_address <= begin
    assert end <= c_address + c_bytes
    assert end > c_address + c_bytes - 256
    assert w.borrowed_bytes == 2 * w.borrowed_slots * 256 <= most
    assert active_blocks * tiles * 128 <= w.borrowed_slots
    assert w.borrowed_slots % 64 == 0
    assert w.borrowed_slots > w.large_slots
    assert rounds * tiles <= w.survey.borrowed_tiles
    assert c_address + w.survey.borrowed_tiles * 128 * row_bytes <= begin, "rows of dC of these rounds' columns"


def test_much_is_borrowed_where_there_is_much():
    """So the property above is not about nothing; and a workspace of the same size is what it was."""
    c_bytes = 2 * 256_000 * 2304
    w = WorkspaceLayout.of(8192, 256_000, 2304, with_e=True, with_sums=False, c_bytes=c_bytes)
    assert w.borrowed_bytes == pytest.approx(192 * MIB, rel=0.1)
    rounds, tiles = borrowed_rounds(w, w.blocks)
    assert rounds * tiles * COLUMN_TILE > 0.75 * 256_000
    assert w.nbytes == WorkspaceLayout.of(8192, 256_000, 2304, with_e=True, with_sums=False).nbytes


@pytest.mark.parametrize(
    "named",
    [
        {"with_e": False, "with_sums": False, "c_bytes": 2**30},
        {"with_e": True, "with_sums": True, "c_bytes": 2**30},
        {"with_e": True, "with_sums": False},
    ],
    ids=["dE is not wanted", "sums are", "dC is added to, or not wanted"],
)
def test_nothing_is_borrowed(named):
    """Rounds would be no faster; sums have no place there; values are there."""
    w = WorkspaceLayout.of(8192, 256_000, 2304, **named)
    assert (w.borrowed_slots, w.borrowed_bytes, w.survey.borrowed_cap, w.survey.borrowed_tiles) == (0, 0, 0, 0)


def test_maps_and_records_tell_where_g_is(monkeypatch):
    told = []
    monkeypatch.setattr(tensor_map, "encode_matrix", lambda *given: told.append(given[:4]) or (len(told),) * 16)
    c_bytes = 2 * 256_000 * 2304
    w = WorkspaceLayout.of(8192, 256_000, 2304, with_e=True, with_sums=False, c_bytes=c_bytes)
    base, c_address = 2**40, 2**41 + 48
    assert w.g_maps(base, c_address, BFLOAT16) == ((1,) * 16, (2,) * 16)
    record = w.at(base, c_address)
    assert told == [(record.g, w.slots, 128, 256), (record.g_borrowed, 2 * w.borrowed_slots, 128, 256)]
    assert record.g == base + w.offsets["g"]
    assert 0 <= (c_address + c_bytes) - (record.g_borrowed + w.borrowed_bytes) < 256
    assert record.done == record.next_job + 4
    assert record.done_e == record.done + 4 * 2 * w.survey.rounds_max
    assert record.done_e + 4 * w.blocks == base + w.offsets["counters"] + 4 * w.counters
    assert (record.buffer_slots, record.large_slots, record.borrowed_slots) == (
        w.buffer_slots, w.large_slots, w.borrowed_slots,
    )  # fmt: skip
    told.clear()
    plain = WorkspaceLayout.of(8192, 256_000, 2304, with_e=True, with_sums=False)
    plain.g_maps(base, 0, BFLOAT16)
    assert told == [(base + plain.offsets["g"], plain.slots, 128, 256)] * 2


# ---- what is small


def test_what_is_small_takes_little():
    w = WorkspaceLayout.of(1, 5, 8, with_e=True, with_sums=True)
    assert w.buffer_slots == COLUMN_TILE + COLUMN_TILE + K_STEP
    assert w.nbytes < MIB


def test_sums_of_d_e_are_kept_for_whole_tiles():
    """Of three blocks of tokens and, for 200 hidden entries, two times 192; none if nobody wants dE."""
    with_e, without = (WorkspaceLayout.of(300, 100_000, 200, with_e=x, with_sums=False) for x in (True, False))
    assert with_e.sums_e_bytes == 3 * 2 * 128 * 192 * 4
    assert without.sums_e_bytes == 0
    assert without.nbytes < with_e.nbytes


def test_a_tile_of_sums_is_what_a_consumers_threads_keep():
    """Two halves of 64 rows: 24 times 16 bytes of each of 128 threads, one thread's beside the next one's."""
    w = WorkspaceLayout.of(1, 100_000, 8, with_e=True, with_sums=False)
    assert w.sums_e_bytes == 2 * (LIST_TILE // 8) * SUMS_STEP
    assert SUMS_STEP == 16 * 128


# ---- rounds


def slots_of_rounds(counts, cap):
    """Columns that each round's lists take, padded, of (blocks, tiles) counts: rounds are cut as the survey cuts them."""
    round_of = np.concatenate([[0], np.cumsum(counts.sum(axis=0))[:-1]]) // cap
    lists = [counts[:, round_of == r].sum(axis=1) for r in range(round_of[-1] + 1)]
    return [int((-(-of_block // K_STEP) * K_STEP).sum()) for of_block in lists]


@given(data=st.data())
def test_whatever_survives_fits_into_a_round(data):
    blocks, tiles = data.draw(st.integers(1, 40), label="blocks"), data.draw(st.integers(1, 60), label="tiles")
    g_bytes = data.draw(st.sampled_from([0, MIB, 4 * MIB]), label="bytes of G")
    w = WorkspaceLayout(128 * blocks, 128 * tiles, 64, False, False, g_bytes)
    kinds = data.draw(st.lists(st.sampled_from([0, 1, 63, 64, 65, 127, 128]), min_size=1), label="survivors of a tile")
    counts = np.random.default_rng(data.draw(st.integers(0, 99), label="seed")).choice(kinds, (blocks, tiles))
    assert max(slots_of_rounds(counts, w.survey.cap)) <= w.buffer_slots


@pytest.mark.parametrize("blocks", [1, 2, 33])
def test_the_worst_case_fits_with_little_to_spare(blocks):
    """Rounds that are full but for one pair, then a whole tile, and lists that end one past a step of the sum."""
    w = WorkspaceLayout(128 * blocks, 128 * 400, 64, False, False, 0)
    counts = np.full((blocks, 400), 65)
    counts[0] = 64
    counts[:, 100:] = 128
    worst = max(slots_of_rounds(counts, w.survey.cap))
    assert w.buffer_slots - 2 * 128 * blocks < worst <= w.buffer_slots


@pytest.mark.parametrize("jobs", [(3, 2), (3, 0)], ids=["both gradients", "dC alone"])
@pytest.mark.parametrize("c_bytes", [0, 2 * 20_000 * 512], ids=["", "borrowed"])
@pytest.mark.parametrize("density", [0.05, 0.3, 0.9, None])
def test_the_surveys_rounds_fit(density, c_bytes, jobs):
    """The buffers that the kernel takes for them."""
    w = WorkspaceLayout(1500, 20_000, 512, True, False, 0, c_bytes)
    found = model(w.survey, make_inputs(1, 1500, 20_000, density=density, listed=0.9, jobs=jobs))
    rounds, n_borrowed, is_dense = (int(found[name][0]) for name in ("n_rounds", "n_borrowed", "dense"))
    assert 2 < rounds <= w.survey.rounds_max
    assert (n_borrowed > 1) == (is_dense == 1 and jobs[1] > 0 and c_bytes > 0)
    assert is_dense == (density in (0.9, None))
    slots = found["first_slot"][:, -1]
    assert slots[:n_borrowed].max(initial=0) <= w.borrowed_slots
    assert slots[n_borrowed:].max() <= (w.large_slots if is_dense and jobs[1] else w.buffer_slots)
    jobs_of_lists, lists = found["first_job"][:, -1], slots
    if is_dense:  # the last round's lists may be shorter than their slots
        edges = found["first_tile"][: rounds + 1]
        lists = np.diff(found["before"][:, edges], axis=1).sum(axis=0)
        assert (jobs_of_lists[:-1] * LIST_TILE == lists[:-1]).all(), "no job computes columns for nothing"
    assert (jobs_of_lists * LIST_TILE >= lists - 1500 // 128 * K_STEP).all()


def test_sums_of_d_e_are_kept_between_rounds_alone():
    w = WorkspaceLayout.of(1000, 1150, 2304, with_e=True, with_sums=False)
    assert (w.survey.rounds_max, w.sums_e_bytes) == (1, 0)


def test_rounds_are_cut_by_the_workspaces_numbers(monkeypatch):
    """As tests of the kernel make them: many small ones."""
    monkeypatch.setattr(workspace_module, "_G_BYTES", (0, 0))
    monkeypatch.setattr(workspace_module, "_SHARE", 0.0)
    w = WorkspaceLayout.of(300, 3000, 64, with_e=True, with_sums=False)
    assert w.buffer_slots == 3 * (2 * 128 + 128 + 64)
    assert w.survey.cap == 3 * 2 * 128
    assert w.survey.rounds_max == 12


# ---- lists


@pytest.mark.parametrize("first", [0, 64, 3 * 2**20])
def test_columns_of_a_step_that_one_thread_copies_are_listed_together(first):
    """Row r of eight, and those that are 8, 16, ..., 56 further down: 32 bytes, and nobody else's."""
    places = np.array([int(listed_place.py_func(first + slot)) - first for slot in range(K_STEP)])
    assert sorted(places) == [*range(K_STEP)]
    for row in range(8):
        assert places[row::8].tolist() == [*range(8 * row, 8 * row + 8)]


# ---- phases


@pytest.mark.parametrize("rounds", range(1, 9))
def test_phases_are_in_the_surveys_order(rounds):
    """G(0), G(1), P(0), G(2), P(1), ..., P(last)."""
    order = [("G", 0)]
    for r in range(1, rounds):
        order += [("G", r), ("P", r - 1)]
    order.append(("P", rounds - 1))
    places = {("G", r): int(phase_of_logits.py_func(r)) for r in range(rounds)}
    places |= {("P", r): int(phase_of_products.py_func(r, rounds)) for r in range(rounds)}
    assert places == {phase: place for place, phase in enumerate(order)}
    for phase, (kind, r) in enumerate(order):
        is_products = bool(is_of_products.py_func(phase, rounds))
        assert is_products == (kind == "P")
        assert int(round_of.py_func(phase, rounds, is_products)) == r


@pytest.mark.parametrize("buffers", [LARGE_BUFFERS, BUFFERS])
def test_no_phase_waits_for_a_later_one(buffers):
    """Products wait for their logits and for the products before; logits for the products whose buffer they take."""
    rounds = 9
    for r in range(rounds):
        products = phase_of_products.py_func(r, rounds)
        assert phase_of_logits.py_func(r) < products
        if r > 0:
            assert phase_of_products.py_func(r - 1, rounds) < products
        if r >= buffers:
            assert phase_of_products.py_func(r - buffers, rounds) < phase_of_logits.py_func(r)


# ---- the order of jobs


@given(rows=st.integers(1, 100), of_row=st.integers(1, 40), group=st.sampled_from([scheduler.GROUP, np.int32(1), np.int32(7)]))
def test_jobs_in_groups(rows, of_row, group):
    """All jobs, each once. If rows have pairs of jobs, two neighbours, which a cluster takes, are of one row: of the same A."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "GROUP", group)
        order = [
            tuple(map(int, scheduler.in_groups.py_func(np.int32(i), np.int32(rows), np.int32(of_row))))
            for i in range(rows * of_row)
        ]
    assert sorted(order) == [(row, place) for row in range(rows) for place in range(of_row)]
    if of_row % 2 == 0:
        for (row, place), neighbour in zip(order[::2], order[1::2], strict=True):
            assert place % 2 == 0
            assert neighbour == (row, place + 1)
    pair = 2 - of_row % 2
    assert order == [
        (row, place)
        for first in range(0, rows, int(group))
        for begin in range(0, of_row, pair)
        for row in range(first, min(rows, first + int(group)))
        for place in range(begin, begin + pair)
    ]


# ---- tiles


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"block_n": 64}, "block_n must be 128"),
        ({"block_v": 128}, "the backward's stages are 2 and 3 panels, and its clusters have 1 or 2 CTAs"),
        ({"cluster": 3}, "the backward's stages are 2 and 3 panels, and its clusters have 1 or 2 CTAs"),
        ({"known_jobs": 0}, "known_jobs must be even"),
        ({"known_jobs": 3}, "known_jobs must be even"),
        ({"known_jobs": 24}, f"takes 262656 bytes of shared memory, but a CTA has at most {MAX_SMEM_BYTES}: fewer stages"),
        ({"stages": 6}, f"takes 271312 bytes of shared memory, but a CTA has at most {MAX_SMEM_BYTES}: fewer stages"),
    ],
)
def test_sizes_that_do_not_work_are_refused(sizes, reason):
    with pytest.raises(ValueError, match=rf"BackwardTiles\(block_n=.*\): {reason}"):
        BackwardTiles(**sizes)


def test_bytes_of_a_cta():
    """By hand: what tiles leave through, the forward's ring of 5 stages, 4 jobs of 16 words, 192 columns, 192 biases; mail."""
    tiles = BackwardTiles()
    assert dataclasses.astuple(tiles) == (128, LIST_TILE, 64, 5, 1, 4)
    assert (tiles.e_bytes, tiles.c_bytes) == (2 * PANEL_BYTES, 3 * PANEL_BYTES)
    assert tiles.ring_bytes == HopperTiles().ring_bytes == 204_896
    assert tiles.job_bytes == 4 * (16 + 192 + 192)
    assert tiles.smem_bytes == 1024 + 2 * (STAGING_BYTES + 4 * 192) + 204_896 + 4 * (1600 + 16) + 8 + 24 <= MAX_SMEM_BYTES
    # Two boxes of 32 columns of G, of 64 tokens; or, for each of four warps, 16 rows of a panel.
    assert STAGING_BYTES == 2 * 32 * 64 * 2 == 4 * 16 * 64 * 2
    assert STAGING_BYTES % 1024 == 0, "the ring lies behind it, where the swizzle's pattern begins"
    assert tiles.full_arrivals == 1 + 64
    assert tiles.block_d == PANEL


def test_registers_are_those_of_a_multiprocessor():
    tiles = BackwardTiles()
    at_start = 65536 // tiles.threads // 8 * 8
    assert 128 * (tiles.producer_registers + tiles.consumers * tiles.consumer_registers) <= tiles.threads * at_start


# ---- gradients that are stored 16 bytes at a time


class OnDevice(np.ndarray):
    """An array that has what the module looks at in CuPy's."""

    data = property(lambda self: SimpleNamespace(ptr=self.ctypes.data))


def gradient_like(rows, columns, dtype, *, pitch=None, offset_bytes=0):
    """Random numbers, rows `pitch` numbers apart, so many bytes past a multiple of 16."""
    pitch, itemsize = pitch or columns, np.dtype(dtype).itemsize
    memory = np.zeros(rows * pitch * itemsize + 32 + offset_bytes, np.uint8)
    start = -memory.ctypes.data % 16 + offset_bytes
    array = memory[start:][: rows * pitch * itemsize].view(dtype).reshape(rows, pitch)[:, :columns]
    array[...] = np.random.default_rng(0).standard_normal((rows, columns)).astype(dtype)
    return array.view(OnDevice)


@pytest.fixture
def numpy_for_cupy(monkeypatch):
    def empty(shape, dtype):
        array = gradient_like(*shape, dtype)
        array[...] = np.nan
        return array

    monkeypatch.setattr(gpu, "cupy", lambda: SimpleNamespace(empty=empty))


GRADIENT_DTYPES = pytest.mark.parametrize("dtype", [np.dtype(np.float16), BFLOAT16, np.dtype(np.float32)], ids=str)


@GRADIENT_DTYPES
def test_gradients_of_whole_chunks_are_taken_as_they_lie(numpy_for_cupy, dtype):
    gradient = gradient_like(3, 40, dtype)
    assert matrices.whole_chunks(gradient, with_values=False) is gradient
    assert matrices.whole_chunks(gradient, with_values=True) is gradient


@pytest.mark.parametrize(
    ("columns", "where"),
    [(37, {}), (1, {}), (40, {"offset_bytes": 8}), (40, {"pitch": 44}), (40, {"pitch": 48})],
    ids=["a row ends within a chunk", "one column", "a start within a chunk", "rows within a chunk", "a view"],
)
@GRADIENT_DTYPES
def test_other_gradients_are_copied(numpy_for_cupy, dtype, columns, where):
    """Into rows of whole chunks, of which the caller sees as many columns as there are."""
    gradient = gradient_like(3, columns, dtype, **where)
    for with_values in (False, True):
        copy = matrices.whole_chunks(gradient, with_values)
        assert not np.shares_memory(copy, gradient)
        assert (copy.shape, copy.dtype) == (gradient.shape, gradient.dtype)
        assert copy.data.ptr % 16 == copy.strides[0] % 16 == 0
        assert copy.strides == (dtype.itemsize * (-(-columns // 8) * 8), dtype.itemsize)
        if with_values:
            np.testing.assert_array_equal(copy.astype(np.float32), gradient.astype(np.float32))
