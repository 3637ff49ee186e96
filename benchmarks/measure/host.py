"""How long the host takes for a call, with a problem so small that the device's time does not matter."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.data import Shape, random
from benchmarks.measure import device, timing

SHAPE: Shape = (256, 2048, 128)
RUNS = 200


def host_us(functions: Sequence[Callable[..., Any]], at_most: float) -> dict[str, Any]:
    """Median and spread of the microseconds until calls return, by library whose arrays come and by function.

    at_most: the limit, which the record keeps beside the figures.
    """
    inputs = random.make(*SHAPE, device.cupy())
    device.require_hopper(inputs)
    libraries: dict[str, Sequence[Any]] = {"CuPy": inputs}
    if device.torch_with_cuda() is not None:
        libraries["PyTorch"] = [device.as_torch(array) for array in inputs]
    found: dict[str, Any] = {"shape": SHAPE, "runs": RUNS, "at_most": at_most}
    for library, arrays in libraries.items():
        found[library] = {}
        for function in functions:
            call = functools.partial(function, *arrays)
            call()  # compiles
            us = 1e3 * np.array(timing.host_ms(call, RUNS))
            found[library][function.__name__] = timing.spread(us, digits=1)
    return found
