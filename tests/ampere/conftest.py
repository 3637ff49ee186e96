"""These kernels need the compiler, and some a GPU."""

from __future__ import annotations

import pytest

from tests.helpers.harness import AmpereHarness, SimulatorHarness

if SimulatorHarness.is_active():
    pytest.skip("the simulator has none of these kernels", allow_module_level=True)


@pytest.fixture(scope="module")
def ampere(request: pytest.FixtureRequest) -> AmpereHarness:
    """Skips, with the reason, on any older GPU; without one `gpu` skips, or fails where one is required."""
    request.getfixturevalue("gpu")
    if reason := AmpereHarness.why_not():
        pytest.skip(reason)
    return AmpereHarness()
