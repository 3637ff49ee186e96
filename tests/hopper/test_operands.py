"""Descriptors of operands in shared memory: the address in units of 16 bytes, and the steps from 16 terms to the next."""

from __future__ import annotations

import numpy as np
import pytest

from tests.helpers.harness import SimulatorHarness

if SimulatorHarness.is_active():
    pytest.skip("the simulator has none of these kernels", allow_module_level=True)

from cce_numba.hopper.operands import NEXT_PANEL, descriptor, form_of, step_of
from cce_numba.ptx.wgmma import PANEL_BYTES, SWIZZLE_128B, SWIZZLE_128B_PANELS


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("address", [0, 1024, 227 * 1024 - 1024])
def test_an_address_is_in_the_lowest_14_bits(address, transposed):
    """ISA 9.7.15.5.1: bits 0 to 13, in units of 16 bytes. The others are the form's."""
    got = descriptor.py_func(form_of(transposed), np.uint32(address))
    assert isinstance(got, np.uint64)
    assert int(got) & 0x3FFF == address // 16
    assert int(got) >> 14 == int(SWIZZLE_128B_PANELS if transposed else SWIZZLE_128B) >> 14


def test_steps_stay_within_64_terms_of_a_panel():
    """Four steps of 16 terms are the 128 bytes of a row, or the 64 rows of a panel."""
    assert 4 * int(step_of(False)) * 16 == 128
    assert 4 * int(step_of(True)) * 16 == PANEL_BYTES == int(NEXT_PANEL) * 16
    for step in (step_of(False), step_of(True), NEXT_PANEL):
        assert isinstance(step, np.uint64)  # a Python integer and a uint64 would make a float64 in numba
