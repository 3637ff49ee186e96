"""How a forward is cut, by arithmetic alone: memory within what is promised, every tile and token in one launch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cce_numba import gpu
from cce_numba.options import Options
from tests.helpers.harness import SimulatorHarness

if SimulatorHarness.is_active():
    pytest.skip("the simulator has none of these kernels", allow_module_level=True)

from cce_numba.hopper.forward.layout import Layout
from cce_numba.hopper.tiles import HopperTiles
from cce_numba.tensor_core import layout as layout_module
from cce_numba.tensor_core import schedule

TILES = HopperTiles()


class Matrix:
    """Of 16-bit numbers, as the layout looks at it; rows `apart` numbers apart."""

    def __init__(self, rows, columns, apart=None, address=1024):
        self.shape, self.itemsize, self.dtype = (rows, columns), 2, None
        self.strides = (2 * (columns if apart is None else apart), 2)
        self.data = type("Memory", (), {"ptr": address})


class Problem:
    def __init__(self, N, V, D, e=None, c=None):
        self.N, self.V, self.D, self.dtype = N, V, D, np.dtype(np.float16)
        self.e, self.c = e or Matrix(N, D), c or Matrix(V, D)
        self.options = Options.of(np.dtype(np.float16), {})


@pytest.fixture(autouse=True, params=[132, 114, 78], ids=lambda count: f"{count} multiprocessors")
def multiprocessors(request, monkeypatch):
    """H100 SXM and H200, H100 PCIe, H20."""
    monkeypatch.setattr(gpu, "current", lambda: gpu.Gpu((9, 0), request.param))


numbers = {
    "N": st.integers(1, 200_000),
    "V": st.integers(1, 300_000),
    "D": st.sampled_from([8, 64, 2304, 4096, 8192, 16_384, 65_536]),
}


@given(**numbers)
def test_scratch_fits_into_what_is_promised(N, V, D):
    """2 MiB beside 20 bytes a token, which the results and the list of tokens take; and 8 bytes for their number."""
    layout = Layout.of(Problem(N, V, D), TILES)
    # Two numbers of a row are those of the log-sum-exp. CuPy rounds four allocations up to 512 bytes.
    assert layout.scratch_bytes(2) + 8 + 512 * 4 <= 2**21
    groups = -(-min(N, layout.batch) // TILES.group_n)
    slots = schedule.count_slots(layout.workers, groups, layout.per_round)
    assert layout.part_numbers == slots * TILES.group_n
    assert layout.scratch_bytes(2) == layout.map_bytes + 2 * 4 * slots * TILES.group_n


@given(**numbers)
def test_every_token_is_in_one_batch_of_whole_groups(N, V, D):
    batches = Layout.of(Problem(N, V, D), TILES).batches()
    assert [first for first, _ in batches] == [sum(n for _, n in batches[:i]) for i in range(len(batches))]
    assert sum(n for _, n in batches) == N
    assert all(first % TILES.group_n == 0 for first, _ in batches)


@given(record=st.booleans(), copied=st.booleans(), **numbers)
def test_every_tile_is_in_one_phase_and_in_reach(record, copied, N, V, D):
    layout = Layout.of(Problem(N, V, D, c=Matrix(V, D, apart=D + 1) if copied else None), TILES)
    phases = layout.phases(record)
    assert [first for _, first, _ in phases] == [0, *(last for _, _, last in phases[:-1])]
    assert phases[-1][2] == layout.n_tiles == -(-V // TILES.block_v)
    assert all(first < last for _, first, last in phases)
    for row, first, last in phases:
        assert row <= first * TILES.block_v
        assert min(last * TILES.block_v, V) <= row + layout.c_rows
    if copied and V > 1:
        assert 2 * layout.c_rows * D <= max(layout_module._COPY_BYTES, 2 * TILES.block_v * (D + 8))
        # A copy is made by the phase that begins with its first row.
        assert {row for row, _, _ in phases} == {row for row, first, _ in phases if first * TILES.block_v == row}


@pytest.mark.parametrize(
    ("V", "ends"),
    [(192, [1]), (192 * 31, [31]), (192 * 33, [16, 33]), (49_152, [16, 80, 256]), (256_000, [21, 105, 525, 1334])],
)
def test_phases_grow_from_a_small_one_that_has_tiles_for_all_workers(V, ends):
    """Where survivors are recorded; without them there is nothing to know beforehand, and one phase."""
    layout = Layout.of(Problem(8192, V, 2304), TILES)
    assert [last for _, _, last in layout.phases(True)] == ends
    assert [last for _, _, last in layout.phases(False)] == [layout.n_tiles]


def test_why_something_is_copied():
    def why(matrix):
        layout = Layout.of(Problem(9, 99, 16, c=matrix), TILES)
        return layout.c_copied, layout.copy_bytes

    assert why(Matrix(99, 16)) == (None, 0)
    assert why(Matrix(99, 16, apart=24)) == (None, 0)
    for matrix, reason in (
        (Matrix(99, 16, apart=17), "its rows are 34 bytes apart"),
        (Matrix(99, 16, address=1026), "does not start at a multiple of 16 bytes"),
        (Matrix(99, 16, apart=8), "16 bytes apart, and overlap"),
        (Matrix(99, 16, apart=-16), "not a positive multiple of 16"),
    ):
        said, size = why(matrix)
        assert reason in said
        assert size == 2 * 99 * 16


def test_equal_layouts_are_one():
    assert Layout.of(Problem(9, 99, 16), TILES) is Layout.of(Problem(9, 99, 16), TILES)
