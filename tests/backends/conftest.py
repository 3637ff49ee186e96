"""Workspaces are poisoned: memory that a backend takes uninitialised is NaN, so that reading what was never written shows.

And what a filter records is what the gradients keep, even if it is nearly all.
"""

from __future__ import annotations

import pytest

from cce_numba import interchange
from cce_numba.arguments import Problem
from tests.helpers.harness import Poisoned, SimulatorHarness


@pytest.fixture(autouse=True, scope="module")
def poisoned_workspaces():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Problem, "xp", property(lambda p: Poisoned(interchange.array_module(p.e))))
        yield


@pytest.fixture(autouse=True, scope="module")
def never_dense():
    """Tensor cores take all columns if nearly all survive, which only the device knows; tests/hopper is about that."""
    if SimulatorHarness.is_active():
        yield
        return
    from cce_numba import survivors

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(survivors, "DENSE_SHARE", 1.0)
        yield
