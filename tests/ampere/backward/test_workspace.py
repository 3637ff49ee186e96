"""The backward's memory, by arithmetic alone: rounds fit their buffers, and parts do not overlap."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.harness import SimulatorHarness

if SimulatorHarness.is_active():
    pytest.skip("the simulator has none of these kernels", allow_module_level=True)

from cce_numba.ampere.backward.workspace import BUFFERS, WorkspaceLayout
from cce_numba.tensor_core.survey.tables import COLUMN_TILE, K_STEP, tiles_of_dense_round

sizes = {
    "N": st.integers(1, 100_000),
    "V": st.integers(1, 300_000),
    "D": st.sampled_from([8, 64, 2304, 4096, 16_384]),
    "with_e": st.booleans(),
    "with_sums": st.booleans(),
    "itemsize": st.sampled_from([2, 4]),
}


@given(**sizes)
def test_a_round_fits_its_buffer(N, V, D, with_e, with_sums, itemsize):
    """A round has fewer pairs than cap before its last tile, and the lists of its blocks are rounded up to steps."""
    layout = WorkspaceLayout.of(N, V, D, with_e=with_e, with_sums=with_sums, itemsize=itemsize)
    most = layout.survey.cap + layout.blocks * (COLUMN_TILE + K_STEP)
    assert most <= layout.buffer_slots
    dense_tiles = tiles_of_dense_round(layout.buffer_slots, layout.blocks)
    assert layout.blocks * COLUMN_TILE * dense_tiles <= layout.buffer_slots, "dense rounds have lists of whole tiles"
    assert layout.buffer_slots % K_STEP == 0, "lists begin at multiples of a step"
    assert BUFFERS * layout.buffer_slots < 2**31


@given(**sizes)
def test_parts_follow_each_other(N, V, D, with_e, with_sums, itemsize):
    layout = WorkspaceLayout.of(N, V, D, with_e=with_e, with_sums=with_sums, itemsize=itemsize)
    places = list(layout.offsets.values())
    assert places == sorted(places)
    assert all(place % 256 == 0 for place in places)
    assert layout.offsets["counters"] == 0, "the host writes zeros to the first bytes"
    assert layout.offsets["survey"] >= 4 * layout.counters
    record = layout.at(4096)
    assert record.done == record.next_job + 4
    assert record.g + 128 * itemsize * BUFFERS * layout.buffer_slots <= record.sums
    assert record.lists + 4 * BUFFERS * layout.buffer_slots <= record.g
    assert (layout.sums_e_bytes > 0) == (with_e and layout.survey.rounds_max > 1)
