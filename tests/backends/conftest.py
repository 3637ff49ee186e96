"""Workspaces are poisoned: memory that a backend takes uninitialised is NaN, so that reading what was never written shows."""

from __future__ import annotations

import pytest

from cce_numba import interchange
from cce_numba.arguments import Problem
from tests.harness import Poisoned


@pytest.fixture(autouse=True, scope="package")
def poisoned_workspaces():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Problem, "xp", property(lambda p: Poisoned(interchange.array_module(p.e))))
        yield
