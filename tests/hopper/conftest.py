"""The tensor-core backend for tests that need a GPU of its kind."""

from __future__ import annotations

import pytest

from tests.helpers.harness import HopperHarness


@pytest.fixture(scope="module")
def hopper(request: pytest.FixtureRequest) -> HopperHarness:
    """Skips, with the reason, on any other GPU; without one `gpu` skips, or fails where one is required."""
    request.getfixturevalue("gpu")
    if reason := HopperHarness.why_not():
        pytest.skip(reason)
    return HopperHarness()
