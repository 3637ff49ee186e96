"""What ends a program early. The command line turns each error into one line and an exit code."""

from __future__ import annotations


class CannotRun(Exception):
    """This machine lacks something that the program needs; the message says what."""


class Wrong(AssertionError):
    """A result is further from the truth than rounding or a filter explains; the message says which result and by how much."""
