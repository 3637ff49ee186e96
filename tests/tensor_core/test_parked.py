"""Where the teacher's logarithms are parked: each number of each thread has a place of its own, and slots do not overlap."""

from __future__ import annotations

import numpy as np
import pytest

from tests.helpers.harness import SimulatorHarness

if SimulatorHarness.is_active():
    pytest.skip("the simulator knows no tensor cores", allow_module_level=True)

from cce_numba.tensor_core import parked


def test_places_fill_the_slots():
    begin, ctas, consumers = 2**40 + 512, 3, 2
    places = [
        int(parked.place_of.py_func(np.uint64(begin), np.int32(slot), np.int32(half), np.int32(thread)))
        for slot in range(ctas * consumers)
        for half in range(2)
        for thread in range(128)
    ]
    chunks = np.arange(192 // parked.CHUNK) * (parked._CHUNK_BYTES // parked.CHUNK) * parked.CHUNK
    every = np.sort((np.array(places)[:, None] + chunks).ravel())
    np.testing.assert_array_equal(every, begin + 16 * np.arange(parked.bytes_of(ctas, consumers) // 16))
