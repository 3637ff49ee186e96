"""The tensor-core backend for tests that need a GPU of its kind."""

from __future__ import annotations

import importlib

import pytest

from tests.helpers.harness import HopperHarness, SimulatorHarness


@pytest.fixture(autouse=True)
def no_programs():
    """What host functions read beside their arguments, such as thresholds, tests may change: then nothing recorded holds."""
    if SimulatorHarness.is_active():
        yield
        return
    programs = importlib.import_module("cce_numba.hopper.programs")
    for kept in (programs.FORWARD, programs.BACKWARD):
        kept.clear()
    yield
    for kept in (programs.FORWARD, programs.BACKWARD):
        kept.clear()


@pytest.fixture(scope="module")
def hopper(request: pytest.FixtureRequest) -> HopperHarness:
    """Skips, with the reason, on any other GPU; without one `gpu` skips, or fails where one is required."""
    request.getfixturevalue("gpu")
    if reason := HopperHarness.why_not():
        pytest.skip(reason)
    return HopperHarness()
