"""Whose time is whose, and ratios of times."""

from __future__ import annotations

import numpy as np

from benchmarks.measure import timing


def test_interleaved_calls_take_turns_and_each_is_charged_its_own_time(clock):
    order = []

    def call(name, ms):
        order.append(name)
        clock.ms += ms * len(order)  # slower and slower

    calls = {"a": lambda: call("a", 1), "b": lambda: call("b", 10)}
    times = timing.interleaved(calls, rounds=2, burst=2)
    assert "".join(order) == "ab" + "aabb" * 2
    assert times == {"a": [(3 + 4) / 2, (7 + 8) / 2], "b": [10 * (5 + 6) / 2, 10 * (9 + 10) / 2]}


def test_ratios_are_those_of_each_round():
    """A clock that halves in the second half of the rounds does not show."""
    floor = np.array([1.0] * 5 + [2.0] * 6)
    found = timing.ratios(list(floor * np.linspace(1.0, 2.0, 11)), list(floor))
    assert found == {"median": 1.5, "p10": 1.1, "p90": 1.9}
