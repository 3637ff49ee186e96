"""What the lessons share: the stepper, pictures, figures, and the machine that kernels run on.

A notebook begins with `lessons.begin()`, before Numba is imported: without a GPU it chooses Numba's simulator, which can only
be chosen before. Importing this package also lets a notebook find the checkout that it belongs to: `cce_numba`, `reference` and
recorded results.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

_ROOT = str(Path(__file__).parents[2])
if _ROOT not in sys.path:
    sys.path.insert(0, _ROOT)


def begin(simulator: bool = True) -> Any:
    """Chooses the machine, says which it is, and returns the module that knows it.

    simulator: False for a lesson whose kernels only a GPU can run; without one it compiles them, and shows what was recorded.
    """
    from . import machine

    machine.choose(simulator)
    if machine.has_gpu():
        print(f"Kernels run on {machine.name()}.")
    elif simulator:
        print("No GPU here: kernels run in Numba's simulator. Times were recorded on the GPU that each table names.")
    else:
        print("No GPU here: what only a GPU can answer is shown as it was recorded on an H100 or H200.")
    return machine
