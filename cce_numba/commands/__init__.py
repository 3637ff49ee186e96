"""The commands of `python -m cce_numba`, one file each, and what they share.

`demo.py` is the way into the demo: it takes a problem from `problems.py`, runs it under `measure.py`, compares it in
`agreement.py`, and shows what `report.py` holds through `show.py`. `npz.py` reads files that are not trusted. `info.py` tells
about the machine, which it asks `machine.py` about, and about compiled kernels. `precompile.py` compiles kernels, for calls
that have any of `options.py`.

Nothing here is imported before a command needs it, so that `--help` is fast and needs no optional package.
"""

from __future__ import annotations

import enum

DTYPES = ("float16", "bfloat16", "float32", "float64")


class Exit(enum.IntEnum):
    """Exit codes, which scripts rely on."""

    FINE = 0
    DISAGREES = 1
    USAGE = 2
    UNAVAILABLE = 3
    INTERRUPTED = 130  # as shells have it for Ctrl-C


class UsageError(Exception):
    """Wrong arguments or a wrong input file; the message is one line that says what must come."""
