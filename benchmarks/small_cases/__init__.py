"""Small problems that reach every kernel, each checked against the reference of the test suite.

A part is a module with a function that returns its checks by name. `sanitize` runs them, and compute-sanitizer watches.
Sizes are ragged, so that every tile, group and round has a last one that is not full, and small, since racecheck is slow.
"""

from __future__ import annotations

from collections.abc import Callable

Check = Callable[[], None]  # raises AssertionError if a result is wrong
