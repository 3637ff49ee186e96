"""The `mma.sync` kernels: problems of the other tensor-core kernels, in rounds of their own that are as small as they get."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

from benchmarks.small_cases import Check, hopper_backward, hopper_forward
from cce_numba.ampere.backward import workspace
from tests.helpers.harness import Harness

# CTAs do not work in pairs, and hidden sizes that would make some are those whose rows have two tiles.
_NAMES = {"single CTAs": "one tile a row", "pairs": "two tiles a row"}


def forward(harness: Harness, odd: Harness) -> dict[str, Check]:
    """Checks of the forward by name; see `hopper_forward.checks`."""
    return hopper_forward.checks(harness, odd)


def backward(harness: Harness, odd: Harness) -> dict[str, Check]:
    """Checks of the backward by name; see `hopper_backward.checks`. G borrows no memory here."""
    found = hopper_backward.checks(harness, odd, small_rounds)
    return {_renamed(name): check for name, check in found.items() if "borrows" not in name}


def _renamed(name: str) -> str:
    for old, new in _NAMES.items():
        name = name.replace(old, new)
    return name


@contextlib.contextmanager
def small_rounds() -> Iterator[None]:
    """Cuts rounds as small as they get."""
    workspace._known.cache_clear()
    try:
        with mock.patch.object(workspace, "_G_BYTES", (0, 0)), mock.patch.object(workspace, "_SHARE", 0.0):
            yield
    finally:
        workspace._known.cache_clear()
