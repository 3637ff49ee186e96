"""How a backward is cut, by arithmetic alone: rounds that fit into their buffers, parts in a row, phases in order."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cce_numba import gpu
from cce_numba.interchange import BFLOAT16
from tests.helpers.harness import SimulatorHarness

if SimulatorHarness.is_active():
    pytest.skip("the simulator has none of these kernels", allow_module_level=True)

from cce_numba.hopper.backward import workspace as workspace_module
from cce_numba.hopper.backward.tiles import PANEL, STAGING_BYTES, BackwardTiles
from cce_numba.hopper.backward.workspace import BUFFERS, BUFFERS_FOR_ALL, WorkspaceLayout
from cce_numba.hopper.tiles import MAX_SMEM_BYTES, HopperTiles
from cce_numba.ptx.wgmma import PANEL_BYTES
from cce_numba.tensor_core import matrices
from cce_numba.tensor_core.backward.lists import listed_place
from cce_numba.tensor_core.backward.partial_sums import SUMS_STEP
from cce_numba.tensor_core.backward.phases import is_of_products, phase_of_logits, phase_of_products, round_of
from cce_numba.tensor_core.survey.tables import COLUMN_TILE, K_STEP, LIST_TILE
from tests.tensor_core.test_survey import make_inputs, model

MIB = 2**20

numbers = {
    "N": st.integers(1, 300_000),
    "V": st.integers(1, 300_000),
    "D": st.sampled_from([8, 64, 2304, 4096, 8192, 16_384]),
    "with_e": st.booleans(),
    "with_sums": st.booleans(),
    "keep_all": st.booleans(),
}


# ---- memory


@given(**numbers)
def test_parts_lie_one_after_the_other(N, V, D, with_e, with_sums, keep_all):
    w = WorkspaceLayout.of(N, V, D, with_e=with_e, with_sums=with_sums, keep_all=keep_all)
    assert w.buffers in ({BUFFERS, BUFFERS_FOR_ALL} if keep_all else {BUFFERS})
    assert w.buffers >= 2
    slots, tiles_of_e = w.buffers * w.buffer_slots, -(-N // 128) * -(-D // 192)
    least = {
        "maps": 3 * 128,
        "counters": 4 * (1 + 2 * w.survey.rounds_max),
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
def test_memory_stays_within_its_share_where_it_can(N, V, D, with_e, with_sums, keep_all):
    """Not where there is little for a share to be of, nor where blocks are so many that each has the least."""
    w = WorkspaceLayout.of(N, V, D, with_e=with_e, with_sums=with_sums, keep_all=keep_all)
    assert w.g_bytes <= 96 * MIB
    has_the_least = w.buffer_slots <= w.blocks * (3 * COLUMN_TILE + K_STEP)
    if w.g_bytes > 40 * MIB and not has_the_least:
        assert w.nbytes <= 0.115 * 2 * D * (N + V)
    if not has_the_least:
        assert w.buffers * w.buffer_slots * w.slot_bytes <= w.g_bytes


@pytest.mark.parametrize("keep_all", [False, True])
def test_the_shape_that_everyone_measures(keep_all):
    """Gemma 2 (2B), 8192 tokens: 1217 MB of gradients, of which the paper's own implementation takes as much again."""
    named = {"with_e": True, "with_sums": False, "keep_all": keep_all}
    w = WorkspaceLayout.of(8192, 256_000, 2304, **named)
    assert w.nbytes <= 0.115 * 2 * 2304 * (8192 + 256_000)
    assert w.g_bytes >= 40 * MIB
    assert w.sums_e_bytes == 4 * 8192 * 2304
    assert w is WorkspaceLayout.of(8192, 256_000, 2304, **named)


def test_rounds_are_bigger_where_nothing_is_filtered():
    """The same memory, for as many columns in fewer buffers."""
    some, all_ = (
        WorkspaceLayout.of(8192, 256_000, 2304, with_e=True, with_sums=False, keep_all=keep_all) for keep_all in (False, True)
    )
    assert BUFFERS_FOR_ALL < BUFFERS
    assert all_.buffer_slots == pytest.approx(some.buffer_slots * BUFFERS / BUFFERS_FOR_ALL, rel=0.05)
    assert all_.survey.rounds_max < some.survey.rounds_max
    assert all_.nbytes == pytest.approx(some.nbytes, rel=0.05)


def test_what_is_small_takes_little():
    w = WorkspaceLayout.of(1, 5, 8, with_e=True, with_sums=True, keep_all=False)
    assert w.buffer_slots == COLUMN_TILE + COLUMN_TILE + K_STEP
    assert w.nbytes < MIB


def test_sums_of_d_e_are_kept_for_whole_tiles():
    """Of three blocks of tokens and, for 200 hidden entries, two times 192; none if nobody wants dE."""
    with_e, without = (WorkspaceLayout.of(300, 100_000, 200, with_e=x, with_sums=False, keep_all=False) for x in (True, False))
    assert with_e.sums_e_bytes == 3 * 2 * 128 * 192 * 4
    assert without.sums_e_bytes == 0
    assert without.nbytes < with_e.nbytes


def test_a_tile_of_sums_is_what_a_consumers_threads_keep():
    """Two halves of 64 rows: 24 times 16 bytes of each of 128 threads, one thread's beside the next one's."""
    w = WorkspaceLayout.of(1, 100_000, 8, with_e=True, with_sums=False, keep_all=False)
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
    keep_all = data.draw(st.booleans(), label="keep all")
    w = WorkspaceLayout(128 * blocks, 128 * tiles, 64, False, False, keep_all, g_bytes)
    kinds = data.draw(st.lists(st.sampled_from([0, 1, 63, 64, 65, 127, 128]), min_size=1), label="survivors of a tile")
    counts = np.random.default_rng(data.draw(st.integers(0, 99), label="seed")).choice(kinds, (blocks, tiles))
    assert max(slots_of_rounds(counts, w.survey.cap)) <= w.buffer_slots


@pytest.mark.parametrize("blocks", [1, 2, 33])
def test_the_worst_case_fits_with_little_to_spare(blocks):
    """Rounds that are full but for one pair, then a whole tile, and lists that end one past a step of the sum."""
    w = WorkspaceLayout(128 * blocks, 128 * 400, 64, False, False, False, 0)
    counts = np.full((blocks, 400), 65)
    counts[0] = 64
    counts[:, 100:] = 128
    worst = max(slots_of_rounds(counts, w.survey.cap))
    assert w.buffer_slots - 2 * 128 * blocks < worst <= w.buffer_slots


@pytest.mark.parametrize("density", [0.05, 0.3, 0.9, None])
def test_the_surveys_rounds_fit(density):
    w = WorkspaceLayout(1500, 20_000, 64, False, False, density is None, 0)
    found = model(w.survey, make_inputs(1, 1500, 20_000, density=density, listed=0.9))
    rounds = int(found["n_rounds"][0])
    assert 2 < rounds <= w.survey.rounds_max
    assert found["first_slot"][:, -1].max() <= w.buffer_slots
    assert (found["first_job"][:, -1] * LIST_TILE >= found["first_slot"][:, -1] - 1500 // 128 * K_STEP).all()


def test_sums_of_d_e_are_kept_between_rounds_alone():
    w = WorkspaceLayout.of(8192, 1000, 2304, with_e=True, with_sums=False, keep_all=True)
    assert (w.survey.rounds_max, w.sums_e_bytes) == (1, 0)


def test_rounds_are_cut_by_the_workspaces_numbers(monkeypatch):
    """As tests of the kernel make them: many small ones."""
    monkeypatch.setattr(workspace_module, "_G_BYTES", (0, 0))
    monkeypatch.setattr(workspace_module, "_SHARE", 0.0)
    w = WorkspaceLayout.of(300, 3000, 64, with_e=True, with_sums=False, keep_all=False)
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


@pytest.mark.parametrize("buffers", [2, BUFFERS])
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
