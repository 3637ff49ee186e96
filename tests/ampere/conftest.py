"""These kernels need the compiler, and some a GPU."""

from __future__ import annotations

import pytest

from tests.helpers.harness import SimulatorHarness

if SimulatorHarness.is_active():
    pytest.skip("the simulator has none of these kernels", allow_module_level=True)
